"""Views as the published encoder asks of its images, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from seen import NOTHING
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor

from vicreg_hf import TwoViews, VICRegConfig, VICRegModel
from vicreg_hf.views.presets import ViewRecipe


def model(architecture: str, **model_args: Any) -> VICRegModel:
    args = model_args or None
    return VICRegModel(VICRegConfig(architecture=architecture, model_args=args, expander_dims=[8]))


@pytest.mark.parametrize(
    ("architecture", "model_args", "size", "expected"),
    [
        ("test_resnet", {}, 32, 32),
        ("test_resnet", {}, None, 160),
        ("test_vit", {"img_size": 64, "in_chans": 1}, None, 64),
        ("test_vit", {"img_size": 64}, 64, 64),
    ],
)
def test_a_published_encoder_sees_images_as_its_views_were(
    architecture: str, model_args: dict[str, Any], size: int | None, expected: int, tmp_path: Path
) -> None:
    made = model(architecture, **model_args)
    if size is not None:
        made.set_image_size(size)
    before = made.config.to_dict()
    views = TwoViews.for_model(made, (NOTHING, NOTHING), image_size=size)
    assert made.config.to_dict() == before  # it leaves the model alone
    assert made.config.pretrained_cfg is not None
    channels = made.config.pretrained_cfg["input_size"][0]
    grey = torch.full((1, channels, 200, 200), 77, dtype=torch.uint8)
    x, _ = views(grey)
    assert x.shape == (1, channels, expected, expected)
    made.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    shown = Image.fromarray(grey[0].permute(1, 2, 0).squeeze().numpy())
    torch.testing.assert_close(processor(shown, return_tensors="pt")["pixel_values"], x)


def test_another_size_is_asked_of_the_model_and_not_of_its_views() -> None:
    made = model("test_vit", img_size=64)
    with pytest.raises(ValueError, match=r"asks for, 64, got 32; call model.set_image_size\(32\)"):
        TwoViews.for_model(made, image_size=32)
    with pytest.raises(ValueError, match="must be the backbone's img_size, 64, got 32; build the"):
        made.set_image_size(32)


IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "indices", "message"),
    [
        (IMAGES.float(), [0, 1], r"got Tensor of torch\.float32 \(2, 3, 8, 8\); give images"),
        (IMAGES.movedim(1, 3), [0, 1], r"of torch\.uint8 \(2, 8, 8, 3\)"),
        (IMAGES[:0], [], r"B at least 1, got .* \(0, 3, 8, 8\)"),
        ([], [0, 1], "got list; give images of several sizes as a list"),
        ([IMAGES], [0], "an image must be one of PIL or a uint8 tensor of shape .3, H, W., got"),
        (IMAGES, [0, 1], "epoch must be given with indices, got none"),
        (IMAGES, [0, 1, 2], "indices must be one for each of 2 images, got 3"),
        (IMAGES, [0.0, 1.0], "indices must be whole numbers from 0, got float64"),
        (IMAGES, [0, -1], "indices must be whole numbers from 0, got int64 from -1"),
    ],
)
def test_images_and_indices_that_cannot_be_are_refused(
    images: Any, indices: Any, message: str
) -> None:
    views = TwoViews(image_size=8)
    with pytest.raises(ValueError, match=message):
        views(images, indices, None if message.startswith("epoch") else 0)
    if message.startswith("indices"):  # which the halves of a view need too
        with pytest.raises(ValueError, match=message):
            views.crop(list(images), indices)
        with pytest.raises(ValueError, match=message):
            views.transform_crops((images, images), indices)


def test_images_of_pil_and_of_several_sizes_are_taken_as_a_list(photographs: Tensor) -> None:
    views, images = TwoViews(image_size=32), [photographs[0], photographs[1, :, 20:]]
    made = views(images, [5, 7], 3)
    crops = views.crop(images, [5, 7], 3)
    assert all(map(torch.equal, made, views.transform_crops(crops, [5, 7], 3)))
    of_pil = views([tv.to_pil_image(image) for image in images], [5, 7], 3)
    assert all(map(torch.equal, made, of_pil))
    grey = TwoViews(image_size=32, in_chans=1)([tv.to_pil_image(image) for image in images])
    assert grey[0].shape == (2, 1, 32, 32)
    assert not torch.equal(views(images)[0], views(images)[0])  # drawn anew at every call


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "x"}, "^preset must be one of authors, .*, a YAML file or its content, got 'x"),
        (
            {"preset": ViewRecipe()},
            r"^preset must be one of .*, got ViewRecipe\(.*; give .*, as \(",
        ),
        ({"preset": {"fliip": 1}}, "^preset must hold preset, x, x_prime, .*, got fliip"),
        ({"preset": (NOTHING,) * 3}, "^preset must be a name or a ViewRecipe for each of 2 views,"),
        ({"image_size": 0}, "number of at least 1 pixel, got 0"),
        ({"image_size": [8, 8.5]}, r"number of at least 1 pixel, got \[8, 8.5\]"),
        ({"image_size": [8]}, "image_size must be one for all views or one for each of 2, got 1"),
        ({"mean": [[0.5]] * 3}, "mean must be one for all views or one for each of 2, got 3"),
        ({"std": [[0.5], [0.1] * 4]}, r"std must be .*, one for each of 3 channels .*, got \[0.1"),
        ({"std": [0.5, 0.0, 0.5]}, r"std must be above 0 for every channel, got \[0.5, 0.0, 0.5"),
        ({"mean": [math.nan]}, r"mean must be a list of finite numbers, .*, got \[nan\]"),
        ({"mean": [None] * 3}, "mean must be a list of finite numbers, .*, got"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViews(**settings)
