"""The pixels of views against PIL's and torchvision's, in any number of channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from seen import MEAN, NOTHING, STD, grey_levels
from torch import Tensor
from torchvision.transforms import functional as tv

from vicreg_hf.views.draws import ColourParameters, draw_colour
from vicreg_hf.views.presets import PRESETS, ViewRecipe
from vicreg_hf.views.two_views import TwoViews


def assert_same_picture(ours: Tensor, expected: Tensor, *, atol: float) -> None:
    """At most atol grey levels apart anywhere, and half a level on average."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    assert (ours - expected).abs().mean() <= 0.5


def colour_with_pil(crop: Tensor, p: ColourParameters, row: int) -> Tensor:
    """The authors' operations after the crop, on one PIL image, in their order."""
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    image: Any = Image.fromarray(crop.permute(1, 2, 0).numpy())
    if p.flip[row]:
        image = ImageOps.mirror(image)
    if p.jitter[row]:
        for operation in p.order[row]:
            image = adjust[operation](image, float(p.factors[row, operation]))
    if p.grayscale[row]:
        image = image.convert("L").convert("RGB")
    if p.blur[row]:
        image = image.filter(ImageFilter.GaussianBlur(float(p.sigma[row])))
    if p.solarize[row]:
        image = ImageOps.solarize(image)
    return tv.normalize(tv.to_tensor(image), list(MEAN), list(STD))


@pytest.mark.parametrize("view", [0, 1])
def test_the_whole_chain_equals_the_authors_pil_pipeline(view: int, photographs: Tensor) -> None:
    crops = photographs[:, :, :40, :40].repeat(8, 1, 1, 1)
    indices = np.arange(len(crops))
    views = TwoViews(image_size=40, preset="authors")
    drawn = draw_colour(views.uniforms(indices, 0, view), PRESETS["authors"][view])
    expected = torch.stack([colour_with_pil(x, drawn, row) for row, x in enumerate(crops)])
    ours = grey_levels(views.colour((crops, crops), indices))[view]
    assert_same_picture(ours, grey_levels((expected, expected))[view], atol=6)


def test_a_view_without_operations_is_the_normalised_image(photographs: Tensor) -> None:
    square = photographs[:, :, :32, :32]
    views = TwoViews(image_size=32, preset=(NOTHING, NOTHING), mean=(0.1, 0.2, 0.3), std=(2, 3, 4))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2.0, 3.0, 4.0])
    expected = (square / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for view in views(square, np.arange(len(square))):
        torch.testing.assert_close(view, expected)


def in_halves(views: TwoViews, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
    """The path of a loading worker and of the device after it, as grey levels."""
    return grey_levels(views.colour(views.crop(list(images), indices, 2), indices, 2))


@pytest.mark.parametrize("side", [16, 64])
def test_crop_then_colour_equals_the_call(side: int, photographs: Tensor) -> None:
    plain = ViewRecipe(jitter=0.0, grayscale=0.5, solarize=0.5)
    views, indices = TwoViews(image_size=side, preset=(plain, plain)), np.arange(16)
    whole = grey_levels(views(photographs, indices, 2))
    assert_same_picture(in_halves(views, photographs, indices), whole, atol=2.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_crop_then_colour_nearly_equals_the_call_after_jitter(
    preset: str, photographs: Tensor
) -> None:
    # contrast and hue may stretch the one grey level by which crops differ here and there
    views, indices = TwoViews(image_size=32, preset=preset), np.arange(16)
    whole = grey_levels(views(photographs, indices, 2))
    apart = (in_halves(views, photographs, indices) - whole).abs()
    assert (apart > 2.01).float().mean() < 1e-3
    assert apart.mean() < 0.05
    assert apart.max() < 12


# Other numbers of channels


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_images_of_other_channels_keep_what_needs_no_colours(
    channels: int, photographs: Tensor
) -> None:
    images = photographs[:, [k % 3 for k in range(channels)]]
    views = TwoViews(image_size=24, preset="authors", in_chans=channels)
    assert views.left_out == ("saturation", "hue", "grayscale")
    whole = views(images, np.arange(16))
    halves = views.colour(views.crop(list(images), np.arange(16)), np.arange(16))
    for view, other in zip(whole, halves, strict=True):
        assert view.shape == (16, channels, 24, 24)
        assert view.isfinite().all()
        assert (view - other).abs().mean() < 0.01
    for k in range(3, channels):  # what is alike stays alike
        torch.testing.assert_close(whole[0][:, k], whole[0][:, k - 3])


def test_a_grey_image_is_jittered_as_by_pil(photographs: Tensor) -> None:
    gray = photographs[:, :1, :40, :40]
    only = replace(NOTHING, jitter=1.0)
    views = TwoViews(40, (only, only), in_chans=1, mean=[0.0], std=[1.0])
    drawn = draw_colour(views.uniforms(np.arange(16), 0, 0), only)
    for row, view in enumerate(views(gray, np.arange(16))[0]):
        image: Any = Image.fromarray(gray[row, 0].numpy())
        for operation in drawn.order[row]:
            factor = float(drawn.factors[row, operation])
            if operation < 2:
                image = (tv.adjust_brightness, tv.adjust_contrast)[operation](image, factor)
        apart = (view[0] * 255 - torch.from_numpy(np.array(image))).abs()
        assert apart.max() <= 2.01


def test_colour_images_leave_nothing_out() -> None:
    assert TwoViews(24).left_out == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"in_chans": 4, "mean": [0.5] * 3}, "mean must have a number per channel, 4, got"),
    ],
)
def test_channels_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViews(24, **settings)


def test_jitter_without_hue_leaves_the_colours(photographs: Tensor) -> None:
    only = replace(NOTHING, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    square = photographs[:, :, :40, :40]
    views = TwoViews(40, (only, only), mean=[0.0] * 3, std=[1.0] * 3)
    torch.testing.assert_close(views(square, np.arange(16))[0] * 255, square.float())
