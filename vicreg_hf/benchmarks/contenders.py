"""The ways to train that `train` compares, each ready to take steps.

Shapes: B images, C channels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from vicreg_hf.benchmarks.loss import authors_loss
from vicreg_hf.benchmarks.peers import (
    DTYPES,
    AuthorsLARS,
    Pair,
    PILViews,
    lightly_parts,
    loaded_views,
    plain_step,
    projector,
)
from vicreg_hf.models.compiling import Compiled, call_directly
from vicreg_hf.training.run import Run
from vicreg_hf.training.step import StepChecks, take_gradients, take_step, views_from_here

WITHOUT_END = 10**6
"""Steps of a run that is never finished."""


@dataclass
class Contender:
    """One way to train, and what it took."""

    precision: str
    views: Callable[[], Generator[Pair]]
    """Batches of views without end, from a start at which nothing is prepared."""
    step: Callable[[Tensor, Tensor], object]
    model: nn.Module
    optimizer: Optimizer | None = None
    workers: int = 1
    """Loading workers: their batches come as many at a time."""
    autotune: bool = False
    """torch.backends.cudnn.benchmark during its turns."""
    seconds: list[float] = field(default_factory=list)
    """A step, in each round."""
    peak: int = 0
    """Bytes on a GPU: model, optimiser and all else of a step."""


def bare(run: Run, precision: str, channels_last: bool) -> Contender:
    """Forward and backward of the backbone alone, on random views that lie ready.

    It is compiled if the run's is.
    """
    device, args = run.accelerator.device, run.args
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = _backbone(run).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    side = run.views.image_sizes[0]
    shape = (args.batch_size, args.in_chans, side, side)
    call = Compiled() if run.model.branches_compiled else call_directly
    pair = tuple(torch.randn(shape, device=device).to(memory_format=layout) for _ in range(2))

    def step(x: Tensor, x_prime: Tensor) -> None:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            total = call(_sum, model, x) + call(_sum, model, x_prime)
        total.backward()
        model.zero_grad()

    return Contender(precision, lambda: _again((pair[0], pair[1])), step, model, autotune=True)


def ours(run: Run, precision: str) -> Contender:
    """The work of every step in `training.pretrain.fit`, without logging, saving and measuring."""
    checks = StepChecks(run)

    def step(*views: Tensor) -> None:
        checks.start(take_gradients(run, views))
        checks.collect(include_latest=False)
        take_step(run)

    run.wrapped.train()
    in_memory = isinstance(run.inputs.images, Tensor)
    return Contender(
        precision, lambda: views_from_here(run, run.step + WITHOUT_END), step, run.model,
        run.inner_optimizer, workers=1 if in_memory else max(1, run.args.num_workers or 0),
        autotune=True,
    )  # fmt: skip


def authors(run: Run, pictures: Sequence[Image.Image | bytes]) -> Contender:
    """The authors' recipe: eager, fp16 on CUDA, PIL views, the covariance form, their LARS.

    Without what their DistributedDataParallel adds on one process.

    Source: vicreg@4e12602, main_vicreg.py.
    """
    make = PILViews(run.views.recipes, run.views.image_sizes[0])
    head = projector(run.model.num_features, run.args.expander_widths)
    precision = "fp16" if run.accelerator.device.type == "cuda" else "fp32"
    lr = 0.2 * run.args.batch_size / 256 / 100  # as in their warm-up
    return _peer(
        run, pictures, make, head, authors_loss, lambda p: AuthorsLARS(p, lr), precision,
        autotune=True,
    )  # fmt: skip


def lightly(run: Run, pictures: Sequence[Image.Image | bytes], precision: str) -> Contender | None:
    """The example of lightly with this backbone, expander and precision; None if not installed."""
    widths = run.args.expander_widths
    parts = lightly_parts(run.model.num_features, widths, run.views.image_sizes[0])
    if parts is None:
        return None
    head, loss, make = parts
    return _peer(run, pictures, make, head, loss, lambda p: SGD(p, lr=0.06), precision)


def _peer(
    run: Run,
    pictures: Sequence[Image.Image | bytes],
    make: Callable[[Image.Image], Any],
    head: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer_of: Callable[[Iterable[Tensor]], Optimizer],
    precision: str,
    *,
    autotune: bool = False,
) -> Contender:
    device, args = run.accelerator.device, run.args
    workers = args.num_workers or 0
    model = nn.Sequential(_backbone(run), head).to(device)
    optimizer = optimizer_of(model.parameters())
    step = plain_step(model, loss, optimizer, device=device, precision=precision)

    def views() -> Generator[Pair]:
        return loaded_views(
            pictures, make, batch_size=args.batch_size, num_workers=workers, device=device
        )

    return Contender(
        precision, views, step, model, optimizer, workers=max(1, workers), autotune=autotune
    )


def _backbone(run: Run) -> nn.Module:
    """The run's backbone anew, as timm makes it."""
    config = run.model.config
    model = timm.create_model(config.architecture, num_classes=0, **(config.model_args or {}))
    return model.to(run.accelerator.device).train()


def _sum(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


def _again(pair: Pair) -> Generator[Pair]:
    while True:
        yield pair
