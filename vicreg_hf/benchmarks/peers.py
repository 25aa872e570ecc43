"""Training steps as the authors' code and lightly's example take them, written plainly.

Shapes: B images, S side of a view.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, RandomSampler

from vicreg_hf.benchmarks.data import pil_view
from vicreg_hf.views.presets import ViewRecipe

Pair = tuple[Tensor, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WITHOUT_END = 10**9
"""Images drawn by a loader that never stops."""


class AuthorsLARS(Optimizer):
    """The authors' optimiser, parameter by parameter.

    Source: vicreg@4e12602, main_vicreg.py, LARS.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, weight_decay: float = 1e-6,
        momentum: float = 0.9, eta: float = 0.001,
    ) -> None:  # fmt: skip
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if update is None:
                    continue
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    param_norm, update_norm = torch.norm(p), torch.norm(update)
                    one = torch.ones_like(param_norm)
                    ratio = group["eta"] * param_norm / update_norm
                    ratio = torch.where(update_norm > 0, ratio, one)
                    update = update.mul(torch.where(param_norm > 0, ratio, one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])


def projector(num_features: int, dims: Sequence[int]) -> nn.Sequential:
    """The authors' expander.

    Source: vicreg@4e12602, main_vicreg.py, Projector.
    """
    layers: list[nn.Module] = []
    widths = [num_features, *dims]
    for i in range(len(widths) - 2):
        layers.append(nn.Linear(widths[i], widths[i + 1]))
        layers.append(nn.BatchNorm1d(widths[i + 1]))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    return nn.Sequential(*layers)


class PILViews:
    """The authors' two views of an image, by their pipeline of PIL operations."""

    def __init__(self, recipes: Sequence[ViewRecipe], side: int) -> None:
        self.views = [pil_view(recipe, side) for recipe in recipes]

    def __call__(self, image: Image.Image) -> list[Any]:
        return [view(image) for view in self.views]


class _Views(Dataset[Any]):
    """Two views of each picture, made where it is loaded."""

    def __init__(
        self, pictures: Sequence[Image.Image | bytes], make: Callable[[Image.Image], Any]
    ) -> None:
        self.pictures, self.make = pictures, make

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        picture = self.pictures[index]
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture))
        return self.make(picture.convert("RGB"))


def loaded_views(
    pictures: Sequence[Image.Image | bytes],
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
    images = _Views(pictures, make)
    loader = DataLoader(
        images, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda",
        sampler=RandomSampler(images, replacement=True, num_samples=WITHOUT_END),
    )  # fmt: skip
    for x, x_prime in loader:
        yield x.to(device, non_blocking=True), x_prime.to(device, non_blocking=True)


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


def lightly_parts(num_features: int, dims: Sequence[int], side: int) -> tuple[Any, Any, Any] | None:
    """The projection head, loss and views of lightly; None where it is not installed.

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

    head = VICRegProjectionHead(num_features, dims[0], dims[-1], num_layers=len(dims))
    return head, VICRegLoss(), VICRegTransform(input_size=side)
