"""A linear classifier of each position of feature maps, trained on pixels of masks.

Logits are enlarged bilinearly to the pixels they are compared with, as `F.interpolate` does with
align_corners=False. Features are standardised by the training maps, as a batch normalisation
without weights whose statistics are those of all of them.

Shapes: N training images, B images of a batch, P pixels of an image, h x w positions of a map,
H x W pixels, F features, K classes, R learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.metrics.segmentation import VOID, Overlaps, pixel_confusion
from vicreg_hf.runtime.randomness import Stream, permutation

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
VALIDATION = 0.1
"""Part of the training images that chooses the learning rate, before it too is learned from."""
MOMENTUM = 0.9
AT_ONCE = 64
"""Maps that are brought to the device together."""
VALUES_AT_ONCE = 2**26
"""Values of classes at pixels that are computed together."""


@dataclass(frozen=True)
class PixelSample:
    """Pixels of training images, and their classes."""

    places: Tensor
    """(N, P, 2) float32 places of pixels' centres, as fractions of an image's height and width."""
    classes: Tensor
    """(N, P) classes from 0; `VOID` where an image has fewer pixels."""

    def take(self, rows: Tensor) -> PixelSample:
        """Those of some images."""
        return PixelSample(self.places[rows], self.classes[rows])


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of some images as they are kept."""

    x: Tensor
    """(N, h w F), of any float dtype."""
    size: tuple[int, int]
    """h, w."""

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, rows: Tensor, device: torch.device) -> Tensor:
        """(B, h w, F) float32 on the device."""
        positions = self.size[0] * self.size[1]
        return self.x[rows].to(device).float().unflatten(1, (positions, -1))


@dataclass(frozen=True)
class LinearHead:
    """A classifier of positions, in float32."""

    weight: Tensor
    """(F, K) of standardised features."""
    bias: Tensor
    """(K,)."""
    mean: Tensor
    """(F,), of the training maps; likewise std."""
    std: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(B, h w, K) of maps (B, h w, F)."""
        return (x - self.mean) / self.std @ self.weight + self.bias

    def predict(self, x: Tensor, size: tuple[int, int], pixels: Sequence[int]) -> Tensor:
        """(H, W) classes of one image's map (h w, F) of a size, on as many pixels as asked for.

        As many classes are enlarged together as have `VALUES_AT_ONCE` values, but at least one.
        """
        small = self.logits(x[None]).transpose(1, 2).unflatten(2, size)
        at_once = max(1, VALUES_AT_ONCE // math.prod(pixels))
        best = small.new_full(list(pixels), -torch.inf)
        classes = torch.zeros_like(best, dtype=torch.long)
        for start in range(0, small.shape[1], at_once):
            part = small[:, start : start + at_once]
            large = F.interpolate(part, list(pixels), mode="bilinear", align_corners=False)
            most, found = large[0].max(0)
            classes = torch.where(most > best, found + start, classes)
            best = torch.maximum(best, most)
        return classes


@dataclass(frozen=True)
class TrainedHead:
    """The head of the best learning rate."""

    head: LinearHead
    learning_rate: float
    validation: dict[float, float]
    """Mean IoU of each learning rate on the pixels of images that were held out of its training;
    none where there was one rate only."""


def train_head(
    maps: FeatureMaps,
    pixels: PixelSample,
    num_classes: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decay: float = 1e-4,
    epochs: int = 50,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TrainedHead:
    """Train a head with each learning rate in one pass, and with the best of them on all images.

    SGD with momentum minimises the cross-entropy of the pixels, its rate falling along a cosine to
    zero. The rate of the largest mean IoU on a tenth of the images is taken.

    Args:
        maps: of N images, as the pixels are.
        num_classes: K.
        batch_size: images per step, at most N.

    Raises:
        ValueError: fewer than two images, or no learning rate.
        FloatingPointError: no rate trains.
    """
    if len(maps) < 2 or not learning_rates:
        raise ValueError(
            "a head needs at least two training images and one learning rate, got "
            f"{len(maps)} and {len(learning_rates)}."
        )
    device = torch.device(device)
    mean, std = _moments(maps, device)
    given = (maps, pixels, num_classes, mean, std)
    chosen = {"weight_decay": weight_decay, "epochs": epochs, "batch_size": batch_size,
              "seed": seed}  # fmt: skip
    order = torch.from_numpy(permutation(len(maps), seed=seed, epoch=0, stream=Stream.SPLIT))
    validation: dict[float, float] = {}
    best = learning_rates[0]
    if len(learning_rates) > 1:
        held_out, kept = order.split([n := max(1, round(VALIDATION * len(maps))), len(maps) - n])
        heads = _fit(*given, rows=kept.sort().values, rates=learning_rates, **chosen)
        scores = [_mean_iou(head, maps, pixels, held_out, num_classes) for head in heads]
        validation = dict(zip(learning_rates, scores, strict=True))
        best = max(validation, key=lambda rate: validation[rate])
    (head,) = _fit(*given, rows=torch.arange(len(maps)), rates=[best], **chosen)
    if not bool(head.weight.isfinite().all()):
        raise FloatingPointError(
            f"the head's weights must be finite, and are not after {epochs} epochs with learning "
            f"rate {best:g}; give a smaller --lr_head."
        )
    return TrainedHead(head, best, validation)


def _moments(maps: FeatureMaps, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean (F,) and standard deviation (F,) over all positions; 1 in place of a constant's."""
    total, square, count = 0.0, 0.0, 0
    for rows in torch.arange(len(maps)).split(AT_ONCE):
        x = maps.rows(rows, device).flatten(0, 1).double()
        total, square, count = total + x.sum(0), square + x.square().sum(0), count + len(x)
    mean = torch.as_tensor(total / count)
    variance = (torch.as_tensor(square / count) - mean.square()).clamp(min=0)
    small = variance.sqrt() <= 1e-6 * mean.abs()
    return mean.float(), torch.where(small, 1.0, variance.sqrt()).float()


def _fit(
    maps: FeatureMaps,
    pixels: PixelSample,
    num_classes: int,
    mean: Tensor,
    std: Tensor,
    *,
    rows: Tensor,
    rates: Sequence[float],
    weight_decay: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> list[LinearHead]:
    """A head for each learning rate, all of which see the same batches of some rows."""
    device = mean.device
    weight = torch.zeros(len(mean), len(rates) * num_classes, device=device, requires_grad=True)
    bias = torch.zeros(len(rates) * num_classes, device=device, requires_grad=True)
    rate = torch.tensor(rates, device=device).repeat_interleave(num_classes)
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    head = LinearHead(weight, bias, mean, std)
    batch_size = min(batch_size, len(rows))
    total = epochs * math.ceil(len(rows) / batch_size)
    step = 0
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(rows), seed=seed, epoch=epoch))
        for batch in rows[order].split(batch_size):
            share = 0.5 * (1 + math.cos(math.pi * step / total))
            loss = _loss(head, maps, pixels, batch, len(rates))
            gradients = torch.autograd.grad(loss, [weight, bias])
            with torch.no_grad():
                momentum[0].mul_(MOMENTUM).add_(gradients[0]).add_(weight, alpha=weight_decay)
                momentum[1].mul_(MOMENTUM).add_(gradients[1])
                weight.addcmul_(momentum[0], rate, value=-share)
                bias.addcmul_(momentum[1], rate, value=-share)
            step += 1
    found = zip(weight.detach().chunk(len(rates), 1), bias.detach().chunk(len(rates)), strict=True)
    return [LinearHead(w, b, mean, std) for w, b in found]


def _loss(
    head: LinearHead, maps: FeatureMaps, pixels: PixelSample, batch: Tensor, num_rates: int
) -> Tensor:
    """The sum over rates of the mean cross-entropy of a batch's pixels that are not void."""
    logits, wanted = _pixel_logits(head, maps, pixels, batch)
    wanted = wanted.flatten()
    logits = logits.flatten(0, 1).unflatten(1, (num_rates, -1))
    several = wanted[:, None].expand(-1, num_rates)
    loss = F.cross_entropy(logits.transpose(1, 2), several, ignore_index=VOID, reduction="sum")
    return loss / (wanted != VOID).sum().clamp(min=1)


def _pixel_logits(
    head: LinearHead, maps: FeatureMaps, pixels: PixelSample, batch: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, P, …) logits at the pixels of some rows, and (B, P) their classes."""
    device = head.weight.device
    small = head.logits(maps.rows(batch, device))
    return enlarge_at(small, pixels.places[batch].to(device), maps.size), (
        pixels.classes[batch].to(device)
    )


def enlarge_at(x: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of maps at places between positions, bilinearly, with a gradient that is reproducible.

    Args:
        x: (B, h w, K).
        places: (B, P, 2) fractions of height and width.
        size: h, w.

    Returns:
        (B, P, K).
    """
    if x.device.type != "cpu":
        return product_at(x, places, size)
    grid = places.flip(-1)[:, :, None].to(x.dtype) * 2 - 1  # width first, from -1 to 1
    maps = x.transpose(1, 2).unflatten(2, size)
    found = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return found[..., 0].transpose(1, 2)


def product_at(x: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """What `enlarge_at` gives, as a product with a (B, P, h w) matrix that is mostly zeros.

    On a GPU the gradient of grid_sample is another one in each run, and this one is not.
    """
    near = []
    for axis, length in enumerate(size):
        at = (places[..., axis] * length - 0.5).clamp(0, length - 1)
        near.append((1 - (at[..., None] - torch.arange(length, device=x.device)).abs()).relu())
    return (near[0][..., :, None] * near[1][..., None, :]).flatten(2) @ x


@torch.no_grad()
def _mean_iou(
    head: LinearHead, maps: FeatureMaps, pixels: PixelSample, rows: Tensor, num_classes: int
) -> float:
    """Mean IoU on the pixels of some rows, 0 for a head that has diverged."""
    if not bool(head.weight.isfinite().all()):
        return 0.0
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for batch in rows.split(AT_ONCE):
        logits, wanted = _pixel_logits(head, maps, pixels, batch)
        confusion += pixel_confusion(logits.argmax(2), wanted, num_classes).cpu()
    found = Overlaps.of(confusion[None]).mean_iou()
    return 0.0 if math.isnan(found) else found
