"""Image operations of the views, batched, each image with its own parameter.

Every operation takes and gives uint8 grey levels, works in float32 in between and rounds where PIL
rounds, so that each stays within two levels of PIL's, which the authors use, on every device. None
has a branch or a loop that depends on a value, so that torch.compile makes one kernel of each.

Shapes: B images, C channels, H x W source pixels, S side of a view.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""PIL's mode of images, by their number of channels."""


def as_pixels(image: Any, channels: int) -> Tensor:
    """One image as (C, H, W) uint8, with as many channels as asked for.

    Args:
        image: of PIL, which is converted, or (C, H, W) uint8.

    Raises:
        ValueError: anything else, or an image of PIL of more than 8 bits.
    """
    if isinstance(image, Image.Image):
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        if deep or channels not in MODES:
            raise ValueError(
                f"images of PIL must have 8 bits and 1, 3 or 4 channels, got mode {image.mode} for "
                f"{channels} channels; scale it to levels of 0 to 255 in a uint8 tensor (C, H, W)."
            )
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns of a way that is shorter
        return tv.pil_to_tensor(image.convert(MODES[channels]))
    right = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
    if not right or len(image) != channels or not image.numel():
        shape = f" {image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise ValueError(
            f"an image must be one of PIL or a uint8 tensor of shape ({channels}, H, W), got "
            f"{type(image).__name__}{shape}."
        )
    return image


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5: PIL's BICUBIC, and torch's when antialias is on."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _resize_matrices(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Antialiased bicubic resampling of [start, start + length) as matrices (B, target, source)."""
    start, length = start.view(-1, 1, 1).float(), length.view(-1, 1, 1).float()
    scale = length / target
    stretch = scale.clamp(min=1.0)
    rows = torch.arange(target, device=start.device).view(1, -1, 1) + 0.5
    columns = torch.arange(source, device=start.device).view(1, 1, -1) - start
    weights = _cubic((columns + 0.5 - rows * scale) / stretch)
    weights = weights * ((columns >= 0) & (columns < length))
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop every image to its box and resize to a square, bicubic with antialiasing.

    A separable filter is two matrix products, so images of one size need no loop. PIL rounds after
    each of the two passes, and so does this.

    Args:
        images: (B, C, H, W) uint8.
        boxes: (B, 4) integers: top, left, height, width.
        size: S, in pixels.

    Returns:
        (B, C, S, S) uint8.
    """
    batch, channels, height, width = images.shape
    across = _resize_matrices(boxes[:, 1], boxes[:, 3], width, size)
    down = _resize_matrices(boxes[:, 0], boxes[:, 2], height, size)
    x = images.reshape(batch, channels * height, width).float()
    x = torch.bmm(x, across.mT).round_().clamp_(0, 255)
    x = x.view(batch, channels, height, size).transpose(1, 2).reshape(batch, height, -1)
    x = torch.bmm(down, x).round_().clamp_(0, 255).to(torch.uint8)
    return x.view(batch, size, channels, size).transpose(1, 2).contiguous()


def _luminance(r: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """ITU-R 601 grey levels, rounded as PIL's mode L with its 16-bit integer weights."""
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) / 65536).floor()


def _gray(x: Tensor) -> Tensor:
    """Grey levels (B, H, W) of RGB, or the mean of any other number of channels."""
    x = x.float()
    return _luminance(*x.unbind(1)) if x.shape[1] == 3 else x.mean(1)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance: other + factor * (x - other), clipped and then truncated."""
    blended = (x.float() - other) * factor.view(-1, 1, 1, 1) + other
    return blended.clamp(0, 255).to(torch.uint8)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale x (B, C, H, W) by factor (B,)."""
    return _blend(x, 0.0, factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Spread x (B, C, H, W) around its mean luminance by factor (B,)."""
    gray = _gray(x)
    # whole levels are summed as integers, which no order of summation changes
    total = gray.to(torch.int32).sum((1, 2)) if x.shape[1] == 3 else gray.sum((1, 2))
    mean = (total / (gray.shape[1] * gray.shape[2]) + 0.5).floor()
    return _blend(x, mean.view(-1, 1, 1, 1), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Spread x (B, 3, H, W) around its luminance by factor (B,)."""
    return _blend(x, _gray(x).unsqueeze(1), factor)


def _floor_of_255_times(x: Tensor) -> Tensor:
    """floor(255 x) of float32 x without the rounding of the product, as PIL has it in double."""
    level = (x * 255).floor()
    return level - (x * 256 - level < x).float()


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (B, 3, H, W) by shift (B,) in turns, -0.5 to 0.5.

    Hue and saturation pass through 256 levels, as they do in PIL's HSV mode, which torchvision's
    ColorJitter uses on PIL images.
    """
    r, g, b = x.float().unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    safe = chroma.clamp(min=1)
    rc, gc, bc = (value - r) / safe, (value - g) / safe, (value - b) / safe
    # 2 + rc - bc and 4 + gc - rc with one rounding: of the two lesser channels, one has distance 1
    green = torch.where(rc == 1, 3 - bc, 1 + rc)
    blue = torch.where(gc == 1, 5 - rc, 3 + gc)
    sixth = torch.where(value == r, bc - gc, torch.where(value == g, green, blue)) / 6
    hue = _floor_of_255_times(torch.where(sixth < 0, 1 + sixth, sixth))
    hue = hue + (shift * 255).trunc().view(-1, 1, 1)
    hue = torch.where(hue < 0, hue + 256, torch.where(hue < 256, hue, hue - 256)) * (6 / 255)
    saturation = _floor_of_255_times(chroma / value.clamp(min=1)) / 255

    def channel(n: int) -> Tensor:
        """Value * (1 - saturation * clip(min(k, 4 - k), 0, 1)) with k = (n + hue) mod 6."""
        k = n + hue
        k = torch.where(k < 6, k, k - 6)
        ramp = torch.minimum(k, 4 - k).clamp(0, 1)
        return (value * (1 - saturation * ramp) + 0.5).to(torch.uint8)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def grayscale(x: Tensor) -> Tensor:
    """Replace RGB (B, 3, H, W) by its luminance, three times."""
    return _gray(x).to(torch.uint8).unsqueeze(1).repeat(1, 3, 1, 1)


def mirror(x: Tensor) -> Tensor:
    """Turn x (B, C, H, W) left to right."""
    return x.flip(-1)


def solarize(x: Tensor, threshold: int = 128) -> Tensor:
    """Invert every level of x (B, C, H, W) at or above the threshold."""
    return torch.where(x < threshold, x, 255 - x)


def _box_radius(sigma: Tensor) -> Tensor:
    """Fractional radius of three box filters with the standard deviation sigma (B,) together.

    Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011; Pillow's BoxBlur.c.
    """
    variance = sigma * sigma / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + rest / (6 * (variance - (whole + 1) ** 2))


def box_weights(sigma: Tensor, largest: float) -> Tensor:
    """Weights (B, R + 1) of a box for the pixels 0, 1, ... R away, from sigma (B,) in pixels.

    R is the reach of the largest sigma.
    """
    taps = int(_box_radius(torch.tensor([largest], dtype=torch.float64)).floor()) + 2
    radius = _box_radius(sigma).unsqueeze(1)
    away = torch.arange(taps, device=sigma.device)
    return (radius + 1 - away).clamp(0, 1) / (2 * radius + 1)


def gaussian_blur(x: Tensor, weights: Tensor) -> Tensor:
    """Blur x (B, C, H, W), edges repeated, as PIL does: three boxes each way, each rounded.

    Args:
        x: uint8.
        weights: (B, R + 1) by `box_weights`.
    """
    batch, channels, height, width = x.shape
    columns = weights.view(-1, 1, 1, weights.shape[1]).unbind(-1)
    x = x.reshape(batch, channels * height, width)
    for _ in range(3):
        x = _box_blur(x, columns, 1)
    x = x.view(batch, channels, height * width)
    for _ in range(3):
        x = _box_blur(x, columns, width)
    return x.view(batch, channels, height, width)


def _box_blur(x: Tensor, weights: tuple[Tensor, ...], step: int) -> Tensor:
    """One box over rows of pixels (B, _, pixels) whose neighbours lie `step` apart."""
    length, reach = x.shape[2], len(weights) - 1
    first, last = x[..., :step], x[..., length - step :]
    padded = torch.cat([*[first] * reach, x, *[last] * reach], 2).float()

    def shifted(by: int) -> Tensor:
        return padded.narrow(2, (reach + by) * step, length)

    total = shifted(0) * weights[0]
    for away in range(1, reach + 1):
        total += (shifted(-away) + shifted(away)).mul_(weights[away])
    return total.add_(0.5).clamp_(0, 255).to(torch.uint8)


def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """X (B, C, H, W) uint8 times scale (C, 1, 1) plus shift (C, 1, 1), float32."""
    return x.float() * scale + shift
