"""The ways to train that `train` compares, each ready to take steps.

The authors' and lightly's are written plainly, as their code and example have them.

Shapes: B images, C channels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, RandomSampler, default_collate

from vicreg_hf.benchmarks.data import WITHOUT_END, Pictures, Views, opened, pil_view
from vicreg_hf.benchmarks.loss import authors_loss
from vicreg_hf.models.compiling import Compiled, call_directly
from vicreg_hf.models.expander import expander
from vicreg_hf.training.building.optimizers import LARS
from vicreg_hf.training.run import Run
from vicreg_hf.training.step import StepChecks, take_gradients, take_step, views_from_here

Pair = tuple[Tensor, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Contender:
    """One way to train, and what it took."""

    precision: str
    views: Callable[[], Generator[Any]]
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
    peak: float = 0.0
    """MiB of the model, the optimiser and all else of a step."""


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

    return Contender(precision, lambda: (pair for _ in repeat(None)), step, model, autotune=True)


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


def authors(run: Run, pictures: Pictures) -> Contender:
    """The authors' recipe: eager, fp16 on CUDA, PIL views, the covariance form, their LARS.

    Without what their DistributedDataParallel adds on one process. LARS is taken parameter by
    parameter, as theirs.

    Source: vicreg@4e12602, main_vicreg.py.
    """
    make = Views(pil_view, run.views.recipes, run.views.image_sizes[0])
    head = expander(run.model.num_features, run.args.expander_widths)
    precision = "fp16" if run.accelerator.device.type == "cuda" else "fp32"
    lr = 0.2 * run.args.batch_size / 256 / 100  # as in their warm-up
    optimizer = partial(LARS, lr=lr, foreach=False)
    return _peer(run, pictures, make, head, authors_loss, optimizer, precision, autotune=True)


def lightly(run: Run, pictures: Pictures, precision: str) -> Contender | None:
    """The example of lightly with this backbone, expander and precision; None if not installed.

    All hidden layers are as wide as the first: its head has one hidden width.

    Source: lightly, examples/pytorch/vicreg.py.
    """
    if find_spec("lightly") is None:  # what fails once it is there is no absence
        return None
    from lightly.loss import VICRegLoss  # pyright: ignore[reportMissingImports]
    from lightly.models.modules.heads import (  # pyright: ignore[reportMissingImports]
        VICRegProjectionHead,
    )
    from lightly.transforms import VICRegTransform  # pyright: ignore[reportMissingImports]

    dims, make = run.args.expander_widths, VICRegTransform(input_size=run.views.image_sizes[0])
    head = VICRegProjectionHead(run.model.num_features, dims[0], dims[-1], num_layers=len(dims))
    return _peer(run, pictures, make, head, VICRegLoss(), partial(SGD, lr=0.06), precision)


def _peer(
    run: Run,
    pictures: Pictures,
    make: Callable[[Image.Image], Any],
    head: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer_of: Callable[[Iterable[Tensor]], Optimizer],
    precision: str,
    *,
    autotune: bool = False,
) -> Contender:
    device, workers = run.accelerator.device, run.args.num_workers or 0
    model = nn.Sequential(_backbone(run), head).to(device)
    optimizer = optimizer_of(model.parameters())
    step = plain_step(model, loss, optimizer, device=device, precision=precision)
    views = partial(
        loaded_views, pictures, make, batch_size=run.args.batch_size, num_workers=workers,
        device=device,
    )  # fmt: skip
    return Contender(
        precision, views, step, model, optimizer, workers=max(1, workers), autotune=autotune
    )


def loaded_views(
    pictures: Pictures,
    make: Callable[[Image.Image], Any],
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Generator[Pair]:
    """Batches without end of what workers make, on the device.

    An epoch has no end because a small data set would measure the start of workers.

    Args:
        pictures: images, or the JPEGs of them.
        make: from an image to two (3, S, S) float32 tensors.
    """
    images: Any = pictures
    loader: Any = DataLoader(
        images, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda",
        sampler=RandomSampler(images, replacement=True, num_samples=10**9),
        collate_fn=partial(_views_of, make),
    )  # fmt: skip
    for x, x_prime in loader:
        yield x.to(device, non_blocking=True), x_prime.to(device, non_blocking=True)


def _views_of(make: Callable[[Image.Image], Any], pictures: Pictures) -> Any:
    return default_collate([make(opened(picture)) for picture in pictures])


def plain_step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    *,
    device: torch.device,
    precision: str,
) -> Callable[[Tensor, Tensor], None]:
    """A step of the usual loop: everything under autocast, a loss scale under fp16."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(x: Tensor, x_prime: Tensor) -> None:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            value = loss(model(x), model(x_prime))
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _backbone(run: Run) -> nn.Module:
    """The run's backbone anew, as timm makes it."""
    config = run.model.config
    model = timm.create_model(config.architecture, num_classes=0, **(config.model_args or {}))
    return model.to(run.accelerator.device).train()


def _sum(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()
