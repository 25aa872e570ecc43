"""Image operations of the views, batched, each sample with its own parameter.

Every operation takes and gives whole grey levels (0 to 255) in float32 and rounds where PIL rounds,
so that each stays within two levels of PIL's, which the authors use, on every device.

Shapes: B images, C channels, H x W source pixels, S side of a view.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


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
        (B, C, S, S) whole grey levels, float32.
    """
    boxes = boxes.to(images.device, non_blocking=True)
    across = _resize_matrices(boxes[:, 1], boxes[:, 3], images.shape[-1], size)
    down = _resize_matrices(boxes[:, 0], boxes[:, 2], images.shape[-2], size)
    x = images.float() @ across.mT.unsqueeze(1)
    x = x.round_().clamp_(0, 255)
    return (down.unsqueeze(1) @ x).round_().clamp_(0, 255)


def luminance(x: Tensor) -> Tensor:
    """ITU-R 601 grey levels (B, 1, H, W) of RGB (B, 3, H, W), rounded as PIL's mode L."""
    r, g, b = x.unbind(1)
    gray = (r * 19595 + g * 38470 + b * 7471 + 32768) / 65536  # PIL's 16-bit integer weights
    return gray.floor_().unsqueeze(1)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """PIL's ImageEnhance: other + factor * (x - other), clipped and then truncated."""
    return ((x - other) * _column(factor) + other).clamp_(0, 255).floor_()


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale x (B, 3, H, W) by factor (B,)."""
    return _blend(x, 0.0, factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Spread x (B, 3, H, W) around its mean luminance by factor (B,)."""
    mean = (luminance(x).mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    return _blend(x, mean, factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Spread x (B, 3, H, W) around its luminance by factor (B,)."""
    return _blend(x, luminance(x), factor)


def _floor_of_255_times(x: Tensor) -> Tensor:
    """floor(255 x) of float32 x without the rounding of the product, as PIL has it in double."""
    level = (x * 255).floor()
    return level - (x * 256 - level < x).float()


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (B, 3, H, W) by shift (B,) in turns, -0.5 to 0.5.

    Hue and saturation pass through 256 levels, as they do in PIL's HSV mode, which torchvision's
    ColorJitter uses on PIL images.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp(min=1)
    rc, gc, bc = (value - r) / safe, (value - g) / safe, (value - b) / safe
    # 2 + rc - bc and 4 + gc - rc with one rounding: of the two lesser channels, one has distance 1
    green = torch.where(rc == 1, 3 - bc, 1 + rc)
    blue = torch.where(gc == 1, 5 - rc, 3 + gc)
    sixth = torch.where(value == r, bc - gc, torch.where(value == g, green, blue)) / 6
    hue = _floor_of_255_times(torch.where(sixth < 0, 1 + sixth, sixth))
    hue = (hue + (shift * 255).trunc().view(-1, 1, 1)) % 256 * (6 / 255)
    saturation = _floor_of_255_times(chroma / value.clamp(min=1)) / 255
    # channel n is value * (1 - saturation * clip(min(k, 4 - k), 0, 1)) with k = (n + hue) mod 6
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + hue.unsqueeze(1)) % 6
    ramp = torch.minimum(k, 4 - k).clamp_(0, 1)
    return (value.unsqueeze(1) * (1 - saturation.unsqueeze(1) * ramp) + 0.5).floor_()


def grayscale(x: Tensor) -> Tensor:
    """Replace RGB (B, 3, H, W) by its luminance, three times."""
    return luminance(x).expand_as(x)


def solarize(x: Tensor, threshold: int = 128) -> Tensor:
    """Invert every level of x (B, C, H, W) at or above the threshold."""
    return torch.where(x < threshold, x, 255 - x)


def _blur_matrices(sigma: Tensor, side: int) -> Tensor:
    """PIL's Gaussian blur along one axis, edges repeated, as matrices (B, side, side).

    PIL approximates the Gaussian by three box filters with fractional ends.

    Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering", SSVM 2011; Pillow's BoxBlur.c.
    """
    variance = sigma * sigma / 3  # of each of the three boxes
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = (whole + rest / (6 * (variance - (whole + 1) ** 2))).view(-1, 1, 1)
    # A box is the overlap of [-radius - 1/2, radius + 1/2] with each pixel; the first and the last
    # pixel also take what falls off the image.
    edges = torch.arange(side + 1, device=sigma.device) - 0.5
    edges[0], edges[-1] = -torch.inf, torch.inf
    distance = edges.view(1, 1, -1) - torch.arange(side, device=sigma.device).view(1, -1, 1)
    cumulative = (distance / (2 * radius + 1) + 0.5).clamp(0, 1)
    box = cumulative.diff(dim=-1)
    return box @ box @ box


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur x (B, C, H, W) with standard deviations sigma (B,) in pixels, edges repeated."""
    across = _blur_matrices(sigma, x.shape[-1]).unsqueeze(1)
    down = across if x.shape[-2] == x.shape[-1] else _blur_matrices(sigma, x.shape[-2]).unsqueeze(1)
    blurred = down @ (x @ across.mT).round_()
    return blurred.round_().clamp_(0, 255)
