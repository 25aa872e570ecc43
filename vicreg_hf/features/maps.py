"""Feature maps: encoders that give one, its principal components as colours, and matches in it.

Shapes: B images, C channels, H x W pixels, h x w positions, F features.
"""

from __future__ import annotations

import colorsys
import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.features.encode import Autocast, encode
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.models.feature_map import feature_map
from vicreg_hf.models.timm_models import is_timm
from vicreg_hf.runtime.checks import one_line

FEWEST = 16
"""Positions of a map below which a picture of it shows nothing."""
DRAWN, GAP, MATCHES = 240, 8, 10
"""Side of a view beside another and the gap between them, in pixels; pairs that are joined."""
DARKEST, BRIGHTEST = 0.01, 0.99
"""Quantiles of a component that become the levels 0 and 255."""


def map_encoder(encoder: Encoder, size: tuple[int, int] | None = None) -> Encoder:
    """The encoder that gives another's feature maps in place of its pooled features.

    Args:
        size: height and width to which it resizes whole images; by default its images are the
            other's evaluation views.

    Returns:
        An encoder of (B, h w F), whose `map_size` is (h, w).

    Raises:
        ValueError: it has no feature map, or takes no images of this size.
    """
    model: Any = encoder.module
    channels, *own = encoder.data_config["input_size"]
    wanted = tuple(own) if size is None else size
    if wanted != tuple(own) and hasattr(model, "set_input_size"):
        model = copy.deepcopy(model)
    module = _Mapped(model).eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        if model is not encoder.module:  # position embeddings are resized
            model.set_input_size(img_size=wanted)
        with torch.inference_mode():
            found = module.map_of(torch.zeros(1, channels, *wanted, device=device))
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError, KeyError) as error:
        raise ValueError(
            f"the encoder must take images of {wanted[0]} x {wanted[1]} pixels for a feature map, "
            f"and does not: {one_line(error)[:300]}; most take the size that they were trained "
            "with, or multiples of 32."
        ) from error
    identity: dict[str, Any] = {"map": list(wanted), "of": encoder.identity}
    prepare = encoder.prepare
    if size is not None:
        identity["whole"] = True
        prepare = partial(_resized, size=size)
    data_config = {**encoder.data_config, "input_size": (channels, *wanted)}
    height, width = found.shape[2:]
    return replace(
        encoder, module=module, num_features=found[0].numel(), prepare=prepare, identity=identity,
        data_config=data_config, map_size=(height, width),
    )  # fmt: skip


class _Mapped(nn.Module):
    """A model of timm or transformers that gives its feature map, flattened to (B, h w F)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.map_of(x).flatten(2).transpose(1, 2).flatten(1)

    def map_of(self, x: Tensor) -> Tensor:
        """(B, F, h, w)."""
        model: Any = self.model
        if is_timm(model):
            return feature_map(model, model.forward_features(x), (x.shape[2], x.shape[3]))
        if not hasattr(model, "model"):
            return model(x)  # of pixels
        return _transformers_map(model.model, x)


def _transformers_map(model: Any, x: Tensor) -> Tensor:
    """(B, F, h, w) of a transformers model's last hidden state.

    Raises:
        ValueError: it is no map, nor a token for each patch.
    """
    model = getattr(model, "vision_model", model)  # of images and texts, such as CLIP
    given = {}
    if "interpolate_pos_encoding" in signature(model.forward).parameters:
        given["interpolate_pos_encoding"] = True
    last = model(pixel_values=x, **given).last_hidden_state
    if last.ndim == 4:
        return last
    patch = getattr(model.config, "patch_size", 0)
    sides = [length // patch for length in x.shape[-2:]] if isinstance(patch, int) and patch else []
    if len(sides) != 2 or last.shape[1] < (count := sides[0] * sides[1]):
        raise ValueError(
            "a feature map needs an encoder that keeps a feature for each place in the image, got "
            f"{type(model).__name__} with an output of shape {tuple(last.shape)}."
        )
    return last[:, -count:].transpose(1, 2).unflatten(2, sides)


def _resized(image: Tensor, *, size: tuple[int, int]) -> Tensor:
    """A whole image (C, H, W) uint8 at another size, bicubically."""
    if tuple(image.shape[-2:]) == size:
        return image
    return tv.resize(image, list(size), InterpolationMode.BICUBIC, antialias=True)


def principal_components(x: Tensor) -> Tensor:
    """Colours of maps by their first three principal components, the same ones for all images.

    The sign of a component is that which makes its largest weight positive, so that colours are the
    same in each run; of fewer than three components the others are gray.

    Args:
        x: (B, h, w, F), of any float dtype.

    Returns:
        (B, h, w, 3) uint8.
    """
    flat = x.detach().cpu().double().flatten(0, 2)
    centred = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, : min(3, flat.shape[1])]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = centred @ axes
    low, high = torch.quantile(
        parts[:: len(parts) // 2**20 + 1], torch.tensor([DARKEST, BRIGHTEST]).double(), dim=0
    )
    flat_part = high - low <= 1e-6 * values[-1].clamp(min=0).sqrt()
    levels = (parts - low) / torch.where(flat_part, 1.0, high - low)
    levels = torch.where(flat_part, 0.5, levels).clamp(0, 1)
    levels = F.pad(levels, (0, 3 - levels.shape[1]), value=0.5)
    return (levels * 255).round().byte().view(*x.shape[:3], 3)


def maps_of(
    model: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """The feature maps (B, h, w, F) of images, float32 on the CPU.

    Args:
        model: of timm, of transformers, or the module of `map_encoder`; on the device.
        images: (B, C, H, W) uint8.
        mean: per channel, of the encoder's preprocessing; likewise std.

    Raises:
        ValueError: the model has no feature map.
    """
    training, module = model.training, model if isinstance(model, _Mapped) else _Mapped(model)
    module.eval()
    try:
        found = encode(
            module.map_of, images, mean=mean, std=std, device=device, autocast=autocast,
            memory_format=torch.channels_last,
        )  # fmt: skip
    finally:
        model.train(training)
    return found.permute(0, 2, 3, 1).cpu()


def colours_of_maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The principal components of maps (B, h, w, F) as pictures (B, 3, H, W) uint8 of a size."""
    colours = principal_components(x).permute(0, 3, 1, 2)
    return tv.resize(colours, list(size), InterpolationMode.NEAREST)


class Matches(NamedTuple):
    """Positions of two maps that are each other's nearest, the most similar first."""

    first: Tensor
    """(n,) positions in the first map, counted along its rows; likewise second."""
    second: Tensor
    similarity: Tensor
    """(n,) their cosine similarity."""


def mutual_matches(first: Tensor, second: Tensor, most: int) -> Matches:
    """The positions of two maps (h, w, F) of one width that are each other's nearest by cosine."""
    a, b = (F.normalize(x.float().flatten(0, 1), dim=1) for x in (first, second))
    similarity = a @ b.T
    best, nearest = similarity.max(1)
    back = similarity.argmax(0)
    own = torch.arange(len(a), device=a.device)
    rows = own[back[nearest] == own]
    rows = rows[best[rows].argsort(descending=True, stable=True)][:most]
    return Matches(rows.cpu(), nearest[rows].cpu(), best[rows].cpu())


def picture_of_matches(first: Tensor, second: Tensor, map_first: Tensor, map_second: Tensor) -> Any:
    """Two views (C, S, S) uint8 side by side, and lines between the most similar positions.

    Args:
        map_first: (h, w, F), of the first view; likewise map_second.

    Returns:
        A picture of PIL.
    """
    matches = mutual_matches(map_first, map_second, MATCHES)
    pictures = [picture_of(view).resize((DRAWN, DRAWN)) for view in (first, second)]
    sheet = Image.new("RGB", (2 * DRAWN + GAP, DRAWN), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place * (DRAWN + GAP), 0))
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(
        zip(matches.first.tolist(), matches.second.tolist(), strict=True)
    ):
        hue = colorsys.hsv_to_rgb(number / MATCHES, 0.9, 1.0)
        colour = tuple(round(255 * part) for part in hue)
        ends = []
        for place, (position, own) in enumerate(zip(pair, (map_first, map_second), strict=True)):
            row, column = divmod(position, own.shape[1])
            x = place * (DRAWN + GAP) + (column + 0.5) / own.shape[1] * DRAWN
            ends.append((x, (row + 0.5) / own.shape[0] * DRAWN))
        draw.line([*ends], fill=colour, width=2)
        for x, y in ends:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline="white", fill=colour)
    return sheet


def picture_of(image: Tensor) -> Any:
    """An image (C, H, W) uint8 as a picture of PIL in RGB: the first three bands, or gray."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).cpu().contiguous().numpy())
