"""One step of training: its views, its gradients, and their use."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from vicreg_hf.data.batches import training_views
from vicreg_hf.modeling_vicreg import VICRegOutput
from vicreg_hf.runtime.distributed import (
    Vote,
    norms_of,
    own_part,
    shapes_compared,
    sum_over_processes,
)
from vicreg_hf.runtime.randomness import Stream, derive_seed
from vicreg_hf.training.gradcache import backward_in_chunks
from vicreg_hf.training.run import Run


@dataclass
class Step:
    """The output and the gradients of a step, on the device."""

    number: int
    """From 1, as in metrics.jsonl."""
    lr: float
    output: VICRegOutput
    names: list[str]
    """P parameters that have a gradient."""
    grad_norms: Tensor
    """(P,): of each of their gradients; under fp16 without the loss scale."""
    grad_norm: Tensor
    """Scalar, of all gradients together, before they are clipped; likewise `grad_norms`."""


def views_from_here(run: Run, until: int | None = None) -> Any:
    """The views of each step from the run's own on."""
    last = run.total_steps if until is None else until
    return training_views(
        run.inputs.images, run.batches, run.views, steps=range(run.step, last),
        device=run.accelerator.device, num_workers=run.args.num_workers or 0, bad=run.inputs.bad,
        paired=run.paired, reduced=run.reduced,
    )  # fmt: skip


def take_gradients(run: Run, views: tuple[Any, ...]) -> Step:
    """Set the learning rates, and compute loss, gradients and their norms; clip the gradients.

    Args:
        views: of a step, as `training_views` gives them.
    """
    lr = run.lr
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # of layer_decay
    # Dropout and drop-path draw from torch's generator: keyed too, so that resuming is exact.
    rank = run.accelerator.process_index
    seed = derive_seed(run.args.seed, epoch=run.step, index=rank, stream=Stream.DROPOUT)
    torch.manual_seed(seed)
    x, x_prime, *others = views
    places = others.pop() if run.views.places else None
    num_further, batches = run.args.num_global_views - 2, run.batches
    more: Any = {"further_views": others[:num_further], "local_views": others[num_further:]}
    with shapes_compared(run.shapes_compared):
        if batches.micro_batch_size < batches.batch_size:
            output = backward_in_chunks(
                run.model, x, x_prime, places, **more,
                chunk_size=batches.micro_batch_size // run.accelerator.num_processes,
                wrapped=run.wrapped, backward=run.accelerator.backward,
                autocast=run.accelerator.autocast,
            )  # fmt: skip
        else:
            output = run.wrapped(x, x_prime, places, **more)
            run.accelerator.backward(output.loss)
    run.shapes_compared = True
    if run.accelerator.scaler is not None:
        run.accelerator.unscale_gradients(run.optimizer)
    grads = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    norms = norms_of([own_part(grad) for grad in grads.values()], sharded=run.twin is not None)
    norm = torch.linalg.vector_norm(norms)
    if run.args.max_grad_norm is not None:
        clip_grads_with_norm_(run.model.parameters(), run.args.max_grad_norm, norm)
    return Step(run.step + 1, lr, output, list(grads), norms, norm)


def take_step(run: Run) -> None:
    """Apply the gradients, and follow the weights with their average."""
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.average is not None:
        run.average.update(run.model)
    run.step += 1


@torch.no_grad()
def representations(run: Run, step: Step, views: tuple[Any, ...]) -> Tensor:
    """What the online probe learns from: (B, F), of the first views by the model it measures.

    Args:
        views: of the step, as `training_views` gives them.
    """
    if run.average is None:
        assert step.output.pooler_output is not None
        return step.output.pooler_output
    size = run.batches.micro_batch_size // run.accelerator.num_processes
    average: Any = run.average.module

    def encode(x: Tensor) -> Tensor:
        if run.twin is None:
            return run.published.encoder(x)
        return average(x, return_features=False).pooler_output  # which makes its weights whole

    with run.accelerator.autocast():
        return torch.cat([encode(chunk) for chunk in views[0].split(size)])


def loss_and_terms(run: Run, step: Step) -> dict[str, float]:
    """The loss of a step and its terms; every process must call this.

    VICReg's are those of all processes; of a loss of one's own the mean over processes is taken.
    """
    scalars = step.output.scalars
    if run.loss_name is None or run.accelerator.num_processes == 1:
        return {name: value.item() for name, value in scalars.items()}
    total = sum_over_processes(torch.stack([value.float() for value in scalars.values()]))
    mean = total / run.accelerator.num_processes
    return dict(zip(scalars, mean.tolist(), strict=True))


LEAST_SCALE = 1.0
"""Loss scale of fp16 down to which a gradient that is not finite is an accident: the step is
skipped, and the scale halved."""
STEPS_BEHIND = {"cuda": 1}
"""How many steps the finite-or-stop check may lag behind, by device; 0 on devices not listed.

A GPU would otherwise wait for the answer in every step. It still does under fp16, whose loss scale
is looked at."""


class CheckResult(NamedTuple):
    """The processes' common findings since the last call."""

    bad_step: Step | None
    """The first step that is not finite."""
    stopping: bool
    """A process was asked to stop."""
    save_failed: bool
    """A checkpoint could not be written."""


class StepChecks:
    """The processes' common check of each step, whose result a GPU learns one step later.

    All processes must make the same calls.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.device = run, run.accelerator.device
        self.steps_behind = STEPS_BEHIND.get(self.device.type, 0)
        self._pending: deque[tuple[Step, Vote]] = deque()

    def start(self, step: Step, *, stopping: bool = False) -> None:
        """Begin to check a step that is about to be taken.

        Args:
            stopping: whether this process was asked to stop.
        """
        flags = (not_finite(self.run, step), stopping, self.run.writer.failed)
        self._pending.append((step, Vote(flags, self.device)))

    def collect(self, *, include_latest: bool) -> CheckResult:
        """Read the results that are due.

        Args:
            include_latest: wait for the step about to be taken too, as it will be logged or saved.
        """
        stopping = save_failed = False
        while self._pending and (
            include_latest or stopping or len(self._pending) > self.steps_behind
        ):
            step, vote = self._pending.popleft()
            bad, asked, failed = vote.read()
            if bad:
                return CheckResult(step, stopping, save_failed)
            stopping, save_failed = stopping or asked, save_failed or failed
        return CheckResult(None, stopping, save_failed)


def not_finite(run: Run, step: Step) -> Tensor:
    """Whether a step would spoil the weights: scalar bool, on the device."""
    assert step.output.loss is not None
    bad = ~torch.isfinite(step.output.loss.detach())
    scaler = run.accelerator.scaler
    if scaler is None or scaler.get_scale() <= LEAST_SCALE:
        bad = bad | ~torch.isfinite(step.grad_norm)
    return bad
