"""Pixels of views against PIL's: each operation, at its extremes too, and all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from seen import MEAN, STD, grey_levels
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vicreg_hf.views import operations as pixels
from vicreg_hf.views.draws import draw_transforms
from vicreg_hf.views.presets import PRESETS
from vicreg_hf.views.two_views import TwoViews

Operation = Callable[[Tensor, Tensor], Tensor]
Reference = Callable[[Image.Image, float], Image.Image]


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """(2, 3, 427, 640) uint8."""
    bundle: Any = load_sample_images()
    return from_pil(bundle.images)


@pytest.fixture(scope="module")
def patches(pictures: Tensor) -> Tensor:
    """(4, 3, 150, 210) uint8; not square, so that a swapped axis shows."""
    corners = [(0, 0, 0), (1, 200, 400), (0, 120, 60), (1, 250, 300)]
    return torch.stack([pictures[k, :, y : y + 150, x : x + 210] for k, y, x in corners])


@pytest.fixture(scope="module")
def colours() -> Tensor:
    """(1, 3, 64, 64): every colour whose channels are multiples of 17, black and white included."""
    levels = (torch.arange(16) * 17).byte()
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 64, 64)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.byte().permute(1, 2, 0).numpy())


def from_pil(images: Sequence[Any]) -> Tensor:
    stacked = np.stack([np.array(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def assert_same_picture(
    ours: Tensor, expected: Tensor, *, atol: float = 2, mean: float = 0.02
) -> None:
    """At most atol grey levels apart anywhere, and nearly none on average."""
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=atol)
    assert (ours.float() - expected.float()).abs().mean() <= mean


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    return pixels.gaussian_blur(x, pixels.box_weights(sigma, sigma.max().item()))


def pils_blur(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


OPERATIONS = [
    pytest.param(pixels.adjust_brightness, tv.adjust_brightness, [0.6, 1.4, 0.0, 2.0], id="b"),
    pytest.param(pixels.adjust_contrast, tv.adjust_contrast, [0.6, 1.4, 0.0, 2.0], id="c"),
    pytest.param(pixels.adjust_saturation, tv.adjust_saturation, [0.8, 1.2, 0.0, 2.0], id="s"),
    pytest.param(pixels.adjust_hue, tv.adjust_hue, [-0.1, 0.1, -0.5, 0.5], id="h"),
    # authors' range, and a box as wide as the picture is high
    pytest.param(blur, pils_blur, [0.1, 0.7, 2.0, 40.0], id="blur"),
]


@pytest.mark.parametrize("images", ["patches", "colours"])
@pytest.mark.parametrize(("operation", "reference", "values"), OPERATIONS)
def test_each_image_is_changed_by_its_own_parameter_as_by_pil(
    operation: Operation, reference: Reference, values: list[float], images: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    given = request.getfixturevalue(images).expand(4, -1, -1, -1)
    expected = [reference(to_pil(x), v) for x, v in zip(given, values, strict=True)]
    ours = operation(given, torch.tensor(values))
    assert ours.dtype == torch.uint8
    assert_same_picture(ours, from_pil(expected))


@pytest.mark.parametrize("largest", [2.0, 7.0])
def test_the_blur_is_pils_pixel_for_pixel(largest: float, patches: Tensor) -> None:
    # sigmas whose boxes give no ties: PIL's weights, of 24 bits, would round those down
    sigma = torch.tensor([0.13, 0.53, 1.31, 1.97])
    blurred = pixels.gaussian_blur(patches, pixels.box_weights(sigma, largest))
    expected = [pils_blur(to_pil(x), v) for x, v in zip(patches, sigma.tolist(), strict=True)]
    torch.testing.assert_close(blurred, from_pil(expected), rtol=0, atol=0)


def test_operations_without_parameters_equal_pil_exactly(patches: Tensor, colours: Tensor) -> None:
    for images in (patches, colours):
        for operation, reference in (
            (pixels.grayscale, lambda image: tv.to_grayscale(image, 3)),
            (pixels.solarize, ImageOps.solarize),
        ):
            expected = from_pil([reference(to_pil(image)) for image in images])
            torch.testing.assert_close(operation(images), expected, rtol=0, atol=0)


# Boxes are no higher than wide: for others the newest Pillow resizes vertically first, whereas the
# Pillow of the authors, and resized_crop, go horizontally first.
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 427, 640], [0, 0, 427, 640]],  # whole
        [[10, 20, 96, 96], [331, 544, 96, 96]],  # square
        [[100, 50, 60, 80], [3, 1, 200, 230]],  # wide
        [[7, 600, 7, 9], [300, 0, 20, 21]],  # enlarged
        [[426, 639, 1, 1], [0, 0, 1, 640]],  # one pixel high
    ],
)
def test_each_photograph_is_cropped_to_its_own_box_as_by_pil(
    boxes: list[list[int]], size: int, pictures: Tensor
) -> None:
    expected = [
        tv.resized_crop(to_pil(x), *box, [size, size], InterpolationMode.BICUBIC)  # type: ignore[arg-type]
        for x, box in zip(pictures, boxes, strict=True)
    ]
    ours = pixels.resized_crop(pictures, torch.tensor(boxes), size)
    assert_same_picture(ours, from_pil(expected))


def transform_with_pil(crop: Tensor, drawn: Any) -> Tensor:
    """The authors' operations after the crop, on one PIL image, in their order."""
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    image: Any = to_pil(crop)
    if drawn["flip"]:
        image = ImageOps.mirror(image)
    if drawn["jitter"]:
        for operation in drawn["order"]:
            image = adjust[operation](image, float(drawn["factors"][operation]))
    if drawn["grayscale"]:
        image = image.convert("L").convert("RGB")
    if drawn["blur"]:
        image = image.filter(ImageFilter.GaussianBlur(float(drawn["sigma"])))
    if drawn["solarize"]:
        image = ImageOps.solarize(image)
    return tv.normalize(tv.to_tensor(image), list(MEAN), list(STD))


@pytest.mark.parametrize("view", [0, 1])
def test_the_whole_chain_equals_the_authors_pil_pipeline(view: int, photographs: Tensor) -> None:
    crops = photographs[:, :, :40, :40].repeat(8, 1, 1, 1)
    indices = np.arange(len(crops))
    views = TwoViews(image_size=40, preset="authors")
    drawn = draw_transforms(views.uniforms(indices, 0, view), PRESETS["authors"][view])
    expected = torch.stack(
        [transform_with_pil(x, own) for x, own in zip(crops, drawn, strict=True)]
    )
    ours = grey_levels(views.transform_crops((crops, crops), indices))[view]
    assert_same_picture(ours, grey_levels((expected, expected))[view], atol=6, mean=0.5)


@pytest.mark.parametrize("preset", PRESETS)
def test_both_halves_nearly_equal_the_call(preset: str, photographs: Tensor) -> None:
    # contrast and hue may stretch the one grey level by which crops differ here and there
    views, rows = TwoViews(image_size=32, preset=preset), np.arange(16)
    halves = views.transform_crops(views.crop(list(photographs), rows, 2), rows, 2)
    apart = (grey_levels(halves) - grey_levels(views(photographs, rows, 2))).abs()
    assert (apart > 2.01).float().mean() < 1e-3
    assert apart.mean() < 0.05
    assert apart.max() < 12


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_keep_what_needs_no_colours(
    channels: int, photographs: Tensor
) -> None:
    images = photographs[:, [k % 3 for k in range(channels)]]
    views = TwoViews(image_size=24, preset="authors", in_chans=channels)
    assert views.left_out == ("saturation", "hue", "grayscale")
    whole = views(images, np.arange(16), 0)
    halves = views.transform_crops(views.crop(list(images), np.arange(16)), np.arange(16))
    for view, other in zip(whole, halves, strict=True):
        assert view.shape == (16, channels, 24, 24)
        assert view.isfinite().all()
        assert (view - other).abs().mean() < 0.01
    for k in range(3, channels):  # what is alike stays alike
        torch.testing.assert_close(whole[0][:, k], whole[0][:, k - 3])
