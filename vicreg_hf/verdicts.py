"""Whether each step is finite, and whether to stop: what the processes agree on as they go."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_hf.distributed import Vote
from vicreg_hf.run import Run
from vicreg_hf.stepping import Step

LEAST_SCALE = 1.0
"""Loss scale of fp16 at which gradients that are not finite are no accident any more."""
UNREAD = {"cuda": 1}
"""Votes that may be under way when a step is taken, by device; elsewhere none.

A GPU would otherwise wait for the answer in every step. It still does in each one where torch's
synchronised batch normalisation does, and under fp16, whose loss scale is looked at."""


class Verdict(NamedTuple):
    """What the processes have agreed on since it was last asked."""

    bad: Step | None
    """The first step that is not finite."""
    stopping: bool
    unsaved: bool
    """A checkpoint could not be written."""


class Verdicts:
    """Votes on each step, read in their order, and on a GPU one step later.

    All processes must ask and read alike.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.most = UNREAD.get(run.accelerator.device.type, 0)
        self._under_way: deque[tuple[Step, Vote]] = deque()

    def ask(self, step: Step, *, stopping: bool = False) -> None:
        """Vote on a step that is about to be taken.

        Args:
            stopping: whether this process was asked to stop.
        """
        vote = self.run.vote(not_finite(self.run, step), stopping, self.run.writer.failed)
        self._under_way.append((step, vote))

    def read(self, *, everything: bool) -> Verdict:
        """What has been agreed on.

        Args:
            everything: of the step about to be taken too, since something of it will be kept.
        """
        stopping = unsaved = False
        while self._under_way and (everything or stopping or len(self._under_way) > self.most):
            step, vote = self._under_way.popleft()
            bad, asked, failed = vote.read()
            if bad:
                return Verdict(step, stopping, unsaved)
            stopping, unsaved = stopping or asked, unsaved or failed
        return Verdict(None, stopping, unsaved)


def not_finite(run: Run, step: Step) -> Tensor:
    """Whether a step would spoil the weights: scalar bool, on the device.

    Under fp16 gradients overflow now and then; the step is skipped, and the loss scale halved.
    Only where it has become small is that a failure.
    """
    assert step.output.loss is not None
    bad = ~torch.isfinite(step.output.loss.detach())
    scaler = run.accelerator.scaler
    if scaler is None or scaler.get_scale() <= LEAST_SCALE:
        bad = bad | ~torch.isfinite(step.grad_norm)
    return bad
