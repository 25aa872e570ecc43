"""Step time and images per second on many GPUs, predicted from stated assumptions.

A step is arithmetic, memory traffic and kernels of the model and the loss, and communication that
does not hide behind them; views are made meanwhile, and the slower of both counts. What memory a
GPU has is no part of this.

Shapes: N images in all, W processes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vicreg_hf.benchmarks.measuring import MIB, table
from vicreg_hf.benchmarks.scale_counts import (
    FLOAT32,
    LossWork,
    Work,
    authors_loss_work,
    count_work,
    our_loss_work,
)
from vicreg_hf.benchmarks.scale_machine import Machine, assumptions
from vicreg_hf.training.pretrain import RUN_AHEAD

BACKWARD = 2
"""Backward in multiples of forward: a gradient for the input, and one for the weights."""
VIEWS = 2
IMAGENET, EPOCHS = 1_281_167, 100
HEADER = [
    "GPUs", "images each", "backbone", "expander", "loss", "optimizer", "communication", "input",
    "ms a step", "images/s", "efficiency", "bound by", f"h for {EPOCHS} epochs",
    "authors' loss", "communication", "ms a step", "authors / ours",
]  # fmt: skip
Formula = Literal["ours", "authors"]


@dataclass(frozen=True)
class Step:
    """Seconds of one step's parts."""

    backbone: float
    expander: float
    loss: float
    optimizer: float
    communication: float
    """What backward does not hide."""
    input: float
    checkpoint: float
    """What a step waits for, on average over those between two checkpoints."""
    launching: bool = False
    """Whether the backbone takes what launching its kernels takes."""
    input_meanwhile: bool = True
    """Whether other cores make the views while the step computes."""

    @property
    def seconds(self) -> float:
        computing = self.backbone + self.expander + self.loss + self.optimizer
        computing += self.communication
        together = max(computing, self.input) if self.input_meanwhile else computing + self.input
        return together + self.checkpoint

    @property
    def bound(self) -> str:
        """The largest part; input only where all others together are faster."""
        names = ("backbone", "expander", "loss", "optimizer", "communication")
        parts = {name: getattr(self, name) for name in names}
        if self.input > sum(parts.values()):
            return "input"
        largest = max(parts, key=lambda name: parts[name])
        return "kernel launches" if largest == "backbone" and self.launching else largest


def predict(
    work: Work,
    machine: Machine,
    world: int,
    batch_size: int,
    *,
    formula: Formula = "ours",
    save_steps: int = 1000,
    stripe: int = 2048,
) -> Step:
    """The parts of one step.

    Args:
        world: GPUs.
        batch_size: N, of all GPUs together.
        formula: of the loss.
        save_steps: steps between checkpoints.
        stripe: as for `our_loss_work`.

    Raises:
        ValueError: a batch that GPUs cannot share evenly.
    """
    if batch_size % world or batch_size < 2 * world:
        nearest = max(2, round(batch_size / world)) * world
        raise ValueError(
            "batch_size must give every GPU as many images and at least 2, got "
            f"batch_size={batch_size} for {world} GPUs; the nearest is {nearest}."
        )
    passes = (1 + BACKWARD) * VIEWS
    views = batch_size / world * passes
    launch = 1e-6 * machine.launch_us
    arithmetic = views * work.backbone_flops / machine.backbone_rate
    launches = passes * work.backbone_kernels * launch
    weights = passes * work.expander_weights * machine.embedding_bytes / machine.memory_rate
    loss, loss_rate = _loss_work(work, machine, world, batch_size, formula, stripe)
    backbone = max(arithmetic, launches)
    expander = max(views * work.expander_flops / machine.expander_rate, weights)
    step = Step(
        backbone=backbone,
        expander=max(expander, passes * work.expander_kernels * launch),
        loss=loss.flops / loss_rate + loss.traffic / machine.memory_rate,
        optimizer=max(
            work.optimizer_traffic / machine.memory_rate, work.optimizer_kernels * launch
        ),
        communication=_communication(work, machine, world, loss, backbone),
        input=batch_size / machine.input_rate(world),
        checkpoint=0.0,
        launching=launches > arithmetic,
    )
    hidden = step.seconds * save_steps / RUN_AHEAD  # training goes on for so long, and then waits
    waited = max(0.0, checkpoint_bytes(work) / (1e6 * machine.checkpoint_mb_s) - hidden)
    return replace(step, checkpoint=waited / save_steps)


def checkpoint_bytes(work: Work) -> int:
    """Weights and momentum."""
    return 2 * FLOAT32 * work.parameters


def _loss_work(
    work: Work, machine: Machine, world: int, batch_size: int, formula: Formula, stripe: int
) -> tuple[LossWork, float]:
    """Its work, and FLOP/s."""
    entry = machine.embedding_bytes
    if formula == "authors":
        found = authors_loss_work(batch_size, work.dim, world, embedding_bytes=entry)
        return found, machine.authors_loss_tflops * machine.loss_share * 1e12
    found = our_loss_work(batch_size, work.dim, world, embedding_bytes=entry, stripe=stripe)
    return found, machine.loss_tflops * machine.loss_share * 1e12


def _communication(
    work: Work, machine: Machine, world: int, loss: LossWork, backbone: float
) -> float:
    """Seconds in which a step does nothing but send and receive."""
    if world == 1:
        return 0.0
    seconds = sum(machine.gather_seconds(size, world) for size in loss.gathers)
    seconds += sum(machine.reduce_seconds(size, world) for size in loss.reductions)
    messages = work.norms * VIEWS * machine.messages_per_norm
    seconds += messages * machine.reduce_seconds(0, world)
    gradients = machine.reduce_seconds(FLOAT32 * work.parameters, world)
    # The expander's gradients, which are most of them, are there before the backbone's backward.
    hidden = backbone * BACKWARD / (1 + BACKWARD) if machine.overlap else 0.0
    return seconds + max(0.0, gradients - hidden)


def scale(
    machine: Machine,
    architecture: str,
    *,
    image_size: int,
    batch_size: int,
    expander_dims: Sequence[int],
    gpus: Sequence[int],
    save_steps: int,
    weak: bool = False,
) -> str:
    """The prediction, what it counts and what it assumes, as tables.

    Args:
        gpus: numbers of GPUs.
        weak: keep the images of each GPU, of which the first of `gpus` have `batch_size`.
    """
    work = count_work(architecture, image_size, expander_dims)
    single = _batch(batch_size, gpus[0], 1) if weak else batch_size
    alone = single / predict(work, machine, 1, single, save_steps=save_steps).seconds
    rows = []
    for world in gpus:
        size = _batch(batch_size, gpus[0], world) if weak else batch_size
        ours, authors = (
            predict(work, machine, world, size, formula=formula, save_steps=save_steps)
            for formula in ("ours", "authors")
        )
        rows.append(_row(world, size, alone, ours, authors))
    written = checkpoint_bytes(work)
    lines = [
        f"{architecture} at {image_size} pixels: {work.backbone_flops / 1e9:.2f} GFLOP a view "
        f"forward in {work.backbone_kernels} kernels; expander "
        f"{'-'.join(map(str, expander_dims))}: {work.expander_flops / 1e9:.2f} GFLOP; "
        f"{work.parameters / 1e6:.1f} million parameters, {work.norms} batch normalisations",
        f"{'images of each GPU' if weak else 'global batch'} fixed; checkpoints of "
        f"{written / MIB:.0f} MiB take {written / 1e6 / machine.checkpoint_mb_s:.1f} s to write, "
        f"one in {save_steps} steps",
        "",
        "Predicted, not measured; milliseconds of a step but where another unit is named:",
        "",
        table(HEADER, rows),
        "",
        "Assumed:",
        "",
        table(["", "value", "unit", "source"], assumptions(machine)),
    ]
    return "\n".join(lines)


def _batch(batch_size: int, first: int, world: int) -> int:
    if batch_size % first:
        raise ValueError(
            "batch_size must divide evenly over the first of gpus, got "
            f"batch_size={batch_size} and {first} GPUs; use {first * (batch_size // first + 1)}."
        )
    return batch_size // first * world


def _row(world: int, size: int, alone: float, ours: Step, authors: Step) -> list[str]:
    rate = size / ours.seconds
    parts = (ours.backbone, ours.expander, ours.loss, ours.optimizer, ours.communication)
    return [
        str(world), str(size // world), *(_ms(part) for part in (*parts, ours.input, ours.seconds)),
        f"{rate:.0f}", f"{100 * rate / alone / world:.1f} %", ours.bound,
        f"{IMAGENET * EPOCHS / rate / 3600:.2f}", _ms(authors.loss), _ms(authors.communication),
        _ms(authors.seconds), f"{authors.seconds / ours.seconds:.2f}",
    ]  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
