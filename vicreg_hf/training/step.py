"""One step of training: its views, its gradients, and their use."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_hf.data.batches import training_views
from vicreg_hf.modeling_vicreg import VICRegOutput
from vicreg_hf.runtime.distributed import Vote, shapes_compared
from vicreg_hf.runtime.randomness import Stream, derive_seed
from vicreg_hf.training.gradcache import backward_in_chunks
from vicreg_hf.training.run import Run


@dataclass
class Step:
    """What a step has computed, on the device."""

    number: int
    """From 1, as in metrics.jsonl."""
    lr: float
    output: VICRegOutput
    names: list[str]
    """P parameters that have a gradient."""
    grad_norms: Tensor
    """(P,): of each of their gradients."""
    grad_norm: Tensor
    """Scalar, of all gradients together."""


def views_from_here(run: Run, until: int | None = None) -> Any:
    """The views of each step from the run's own on."""
    last = run.total_steps if until is None else until
    return training_views(
        run.inputs.images, run.batches, run.views, steps=range(run.step, last),
        device=run.accelerator.device, num_workers=run.args.num_workers or 0, bad=run.inputs.bad,
        paired=run.paired,
    )  # fmt: skip


def take_gradients(run: Run, views: tuple[Any, ...]) -> Step:
    """Set the learning rate, and compute loss, gradients and their norms.

    Args:
        views: of a step, as `training_views` gives them.
    """
    lr = run.lr
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    # Dropout and drop-path draw from torch's generator: keyed too, so that resuming is exact.
    device, rank = run.accelerator.device, run.accelerator.process_index
    seed = derive_seed(run.args.seed, epoch=run.step, index=rank, stream=Stream.DROPOUT)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    x, x_prime, *others = views
    num_further, batches = run.args.num_global_views - 2, run.batches
    more: Any = {"further_views": others[:num_further], "local_views": others[num_further:]}
    with shapes_compared(run.shapes_compared):
        if batches.micro_batch_size < batches.batch_size:
            output = backward_in_chunks(
                run.model, x, x_prime, **more,
                chunk_size=batches.micro_batch_size // run.accelerator.num_processes,
                wrapped=run.wrapped, backward=run.accelerator.backward,
                autocast=run.accelerator.autocast,
            )  # fmt: skip
        else:
            output = run.wrapped(x, x_prime, **more)
            run.accelerator.backward(output.loss)
            # last_hidden_state is large, and of no use here
            kept = {k: v for k, v in output.items() if k != "last_hidden_state"}
            output = VICRegOutput(**kept)
    run.shapes_compared = True
    names, norms = gradient_norms(run)
    return Step(run.step + 1, lr, output, names, norms, torch.linalg.vector_norm(norms))


def gradient_norms(run: Run) -> tuple[list[str], Tensor]:
    """The parameters that have a gradient, and its norm (P,); under fp16 without the loss scale."""
    if run.accelerator.scaler is not None:
        run.accelerator.unscale_gradients(run.optimizer)
    grads = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return list(grads), torch.stack(torch._foreach_norm(list(grads.values())))


def take_step(run: Run) -> None:
    """Apply the gradients."""
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1


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
