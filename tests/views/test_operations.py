"""Batched pixel operations against PIL's, on photographs, on every colour and at the extremes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vicreg_hf.views import operations as pixels

Operation = Callable[[Tensor, Tensor], Tensor]
Reference = Callable[[Image.Image, float], Image.Image]


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """(2, 3, 427, 640) uint8."""
    bundle: Any = load_sample_images()
    return torch.from_numpy(np.stack(bundle.images)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def patches(photographs: Tensor) -> Tensor:
    """(4, 3, 150, 210) uint8; not square, so that a swapped axis shows."""
    corners = [(0, 0), (200, 400), (120, 60), (250, 300)]
    cut = [photographs[k % 2, :, y : y + 150, x : x + 210] for k, (y, x) in enumerate(corners)]
    return torch.stack(cut)


@pytest.fixture(scope="module")
def colours() -> Tensor:
    """(1, 3, 64, 64): every colour whose channels are multiples of 17, black and white included."""
    levels = (torch.arange(16) * 17).byte()
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 64, 64)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.byte().permute(1, 2, 0).numpy())


def from_pil(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.array(i) for i in images])).permute(0, 3, 1, 2)


def assert_same_picture(ours: Tensor, expected: Tensor, *, mean: float = 0.02) -> None:
    """At most 2 grey levels apart anywhere, and nearly none on average."""
    assert ours.dtype == torch.uint8
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=2)
    assert (ours.float() - expected.float()).abs().mean() <= mean


ADJUSTMENTS = [
    pytest.param(pixels.adjust_brightness, tv.adjust_brightness, [0.6, 1.4, 0.0, 2.0], id="b"),
    pytest.param(pixels.adjust_contrast, tv.adjust_contrast, [0.6, 1.4, 0.0, 2.0], id="c"),
    pytest.param(pixels.adjust_saturation, tv.adjust_saturation, [0.8, 1.2, 0.0, 2.0], id="s"),
    pytest.param(pixels.adjust_hue, tv.adjust_hue, [-0.1, 0.1, -0.5, 0.5], id="h"),
]


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    return pixels.gaussian_blur(x, pixels.box_weights(sigma, sigma.max().item()))


BLUR = pytest.param(
    blur,
    lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    [0.1, 0.7, 2.0, 40.0],  # authors' range, and a box as wide as the picture is high
    id="blur",
)


@pytest.mark.parametrize(("operation", "reference", "values"), [*ADJUSTMENTS, BLUR])
def test_each_photograph_is_changed_by_its_own_parameter_as_by_pil(
    operation: Operation, reference: Reference, values: list[float], patches: Tensor
) -> None:
    expected = [reference(to_pil(x), v) for x, v in zip(patches, values, strict=True)]
    assert_same_picture(operation(patches, torch.tensor(values)), from_pil(expected))


@pytest.mark.parametrize("largest", [2.0, 7.0])
def test_the_blur_is_pils_pixel_for_pixel(largest: float, patches: Tensor) -> None:
    # sigmas whose boxes give no ties: PIL's weights, of 24 bits, would round those down
    sigma = torch.tensor([0.13, 0.53, 1.31, 1.97])
    blurred = pixels.gaussian_blur(patches, pixels.box_weights(sigma, largest))
    expected = [
        to_pil(x).filter(ImageFilter.GaussianBlur(value))
        for x, value in zip(patches, sigma.tolist(), strict=True)
    ]
    torch.testing.assert_close(blurred, from_pil(expected), rtol=0, atol=0)


@pytest.mark.parametrize(("operation", "reference", "values"), ADJUSTMENTS)
def test_every_colour_is_changed_as_by_pil(
    operation: Operation, reference: Reference, values: list[float], colours: Tensor
) -> None:
    expected = [reference(to_pil(colours[0]), value) for value in values]
    ours = operation(colours.expand(len(values), -1, -1, -1), torch.tensor(values))
    assert_same_picture(ours, from_pil(expected))


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (pixels.grayscale, lambda image: tv.to_grayscale(image, 3)),
        (pixels.solarize, ImageOps.solarize),
    ],
    ids=["grayscale", "solarize"],
)
def test_operations_without_parameters_equal_pil_exactly(
    operation: Callable[[Tensor], Tensor],
    reference: Callable[[Image.Image], Image.Image],
    patches: Tensor,
    colours: Tensor,
) -> None:
    for images in (patches, colours):
        expected = from_pil([reference(to_pil(image)) for image in images])
        torch.testing.assert_close(operation(images), expected, rtol=0, atol=0)


# Boxes are no higher than wide: for others the newest Pillow resizes vertically first, whereas the
# Pillow of the authors, and resized_crop, go horizontally first.
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([[0, 0, 427, 640], [0, 0, 427, 640]], id="whole"),
        pytest.param([[10, 20, 96, 96], [331, 544, 96, 96]], id="square"),
        pytest.param([[100, 50, 60, 80], [3, 1, 200, 230]], id="wide"),
        pytest.param([[7, 600, 7, 9], [300, 0, 20, 21]], id="enlarged"),
        pytest.param([[426, 639, 1, 1], [0, 0, 1, 640]], id="one-pixel-high"),
    ],
)
def test_each_photograph_is_cropped_to_its_own_box_as_by_pil(
    boxes: list[list[int]], size: int, photographs: Tensor
) -> None:
    expected = [
        tv.resized_crop(to_pil(x), *box, [size, size], InterpolationMode.BICUBIC)  # type: ignore[arg-type]
        for x, box in zip(photographs, boxes, strict=True)
    ]
    ours = pixels.resized_crop(photographs, torch.tensor(boxes), size)
    assert_same_picture(ours, from_pil(expected))
