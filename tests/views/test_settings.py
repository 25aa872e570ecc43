"""What views refuse: images, indices and recipes that cannot be."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from seen import NOTHING

from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews


@pytest.mark.parametrize(
    ("images", "received"),
    [
        (torch.zeros(2, 3, 8, 8), r"got Tensor of torch\.float32 \(2, 3, 8, 8\); stack images"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"of torch\.uint8 \(3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"of torch\.uint8 \(2, 8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"B at least 1, got .* \(0, 3, 8, 8\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2, "got list ; stack images of one size"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got ndarray of uint8 \(2, 3, 8, 8\)"),
    ],
)
def test_images_of_another_dtype_or_shape_are_named(images: Any, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        TwoViews(image_size=8)(images, [0, 1])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0], "indices must be one for each of 2 images, got 1"),
        ([0, 1, 2], "indices must be one for each of 2 images, got 3"),
        (5, "indices must be one for each of 2 images, got 1"),
        ([0.0, 1.0], "indices must be whole numbers from 0, got float64"),
        ([True, False], "indices must be whole numbers from 0, got bool"),
        ([0, -1], "indices must be whole numbers from 0, got int64 from -1"),
    ],
)
def test_indices_that_cannot_be_are_refused(indices: Any, message: str) -> None:
    views, images = TwoViews(image_size=8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="images must be at least 1, got none"):
        views.crop([], [])
    for make in (
        views,
        lambda x, rows: views.crop(list(x), rows),
        lambda x, rows: views.transform_crops((x, x), rows),
    ):
        with pytest.raises(ValueError, match=message):
            make(images, indices)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("imagenet", "^preset must be one of authors, .*, a YAML file or its content, got 'imagen"),
        (ViewRecipe(), r"^preset must be one of .*, got ViewRecipe\(.*; give .*, as \(recipe, "),
        (None, "^preset must be one of authors, .*, got None"),
        ({"fliip": 1}, "^preset must hold preset, x, x_prime, .*, got fliip"),
        (("cifar", "paper"), "^preset must be a name or a ViewRecipe for each of 2 views, got"),
        ((NOTHING,) * 3, "^preset must be a name or a ViewRecipe for each of 2 views, got"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(preset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViews(preset=preset)


@pytest.mark.parametrize("recipes", [ViewRecipe(), None, "cifar", ["cifar"], ()])
def test_views_are_made_of_recipes(recipes: Any) -> None:
    with pytest.raises(ValueError, match="recipes must be a ViewRecipe for each of at least 1 vi"):
        RandomViews(8, recipes)


@pytest.mark.parametrize("image_size", [0, [8, 0], 8.0, [8, 8.5], "88", None, True])
def test_a_view_has_a_whole_number_of_pixels(image_size: Any) -> None:
    received = re.escape(repr(image_size))
    with pytest.raises(ValueError, match=f"number of at least 1 pixel, got {received}"):
        TwoViews(image_size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": [8]}, "image_size must be one for all views or one for each of 2, got 1"),
        ({"mean": [[0.5]] * 3}, "mean must be one for all views or one for each of 2, got 3"),
        ({"std": [[0.5], [0.1] * 4]}, r"std must be .*, one for each of 3 channels .*, got \[0.1"),
        ({"std": []}, r"std must be a list of finite numbers, one for each of 3 .*, got \[\]"),
        ({"std": [0.5, 0.0, 0.5]}, r"std must be above 0 for every channel, got \[0.5, 0.0, 0.5"),
        ({"std": [[0.5] * 3, [-1.0]]}, "std must be above 0 for every channel, got"),
        ({"std": [[0.5], 0.5]}, "std must be a list of finite numbers, .*, got 0.5"),
        ({"mean": torch.tensor(0.5)}, "mean must be a list of finite numbers, .*, got 0.5"),
        ({"mean": [math.nan]}, r"mean must be a list of finite numbers, .*, got \[nan\]"),
        ({"mean": [None] * 3}, "mean must be a list of finite numbers, .*, got"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViews(**settings)
