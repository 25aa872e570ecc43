"""The pixels of views against PIL's and torchvision's, in any number of channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from seen import MEAN, STD, grey_levels
from torch import Tensor
from torchvision.transforms import functional as tv

from vicreg_hf.views.draws import draw_transforms
from vicreg_hf.views.presets import PRESETS
from vicreg_hf.views.two_views import TwoViews


def assert_same_picture(ours: Tensor, expected: Tensor, *, atol: float) -> None:
    """At most atol grey levels apart anywhere, and half a level on average."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    assert (ours - expected).abs().mean() <= 0.5


def transform_with_pil(crop: Tensor, drawn: Any) -> Tensor:
    """The authors' operations after the crop, on one PIL image, in their order."""
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    image: Any = Image.fromarray(crop.permute(1, 2, 0).numpy())
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
    assert_same_picture(ours, grey_levels((expected, expected))[view], atol=6)


def in_halves(views: TwoViews, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
    """The path of a loading worker and of the device after it, as grey levels."""
    return grey_levels(views.transform_crops(views.crop(list(images), indices, 2), indices, 2))


@pytest.mark.parametrize("preset", PRESETS)
def test_both_halves_nearly_equal_the_call(preset: str, photographs: Tensor) -> None:
    # contrast and hue may stretch the one grey level by which crops differ here and there
    views, indices = TwoViews(image_size=32, preset=preset), np.arange(16)
    whole = grey_levels(views(photographs, indices, 2))
    apart = (in_halves(views, photographs, indices) - whole).abs()
    assert (apart > 2.01).float().mean() < 1e-3
    assert apart.mean() < 0.05
    assert apart.max() < 12


# Other numbers of channels


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_keep_what_needs_no_colours(
    channels: int, photographs: Tensor
) -> None:
    images = photographs[:, [k % 3 for k in range(channels)]]
    views = TwoViews(image_size=24, preset="authors", in_chans=channels)
    assert views.left_out == ("saturation", "hue", "grayscale")
    whole = views(images, np.arange(16))
    halves = views.transform_crops(views.crop(list(images), np.arange(16)), np.arange(16))
    for view, other in zip(whole, halves, strict=True):
        assert view.shape == (16, channels, 24, 24)
        assert view.isfinite().all()
        assert (view - other).abs().mean() < 0.01
    for k in range(3, channels):  # what is alike stays alike
        torch.testing.assert_close(whole[0][:, k], whole[0][:, k - 3])
