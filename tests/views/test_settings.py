"""What views refuse: images, indices and recipes that cannot be."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from seen import NOTHING, assert_equal_views
from torch import Tensor

from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews


@pytest.mark.parametrize(
    ("images", "received"),
    [
        (torch.zeros(2, 3, 8, 8), r"torch\.float32 of shape \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"torch\.uint8 of shape \(3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"torch\.uint8 of shape \(2, 8, 8, 3\)"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2, "got list; stack those of one size"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"a uint8 tensor of shape \(B, 3, H, W\), got ndarray"),
        (
            torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
            "images must be at least 1, got none of shape",
        ),
    ],
)
def test_images_of_another_dtype_or_shape_are_named(images: Any, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        TwoViews(image_size=8)(images, [0, 1])


def test_no_images_have_no_crops() -> None:
    with pytest.raises(ValueError, match="images must be at least 1, got none"):
        TwoViews(image_size=8).crop([], [])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0], "indices must be one for each of 2 images, got 1"),
        ([0, 1, 2], "indices must be one for each of 2 images, got 3"),
        (5, "indices must be one for each of 2 images, got 1"),
        ([0.0, 1.0], "indices must be whole numbers, got float64"),
        ([True, False], "indices must be whole numbers, got bool"),
        (torch.zeros(2), "indices must be whole numbers, got float32"),
        ([0, -1], "indices must be at least 0, got -1"),
    ],
)
def test_indices_that_cannot_be_are_refused(indices: Any, message: str) -> None:
    views, images = TwoViews(image_size=8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for make in (
        views,
        lambda x, rows: views.crop(list(x), rows),
        lambda x, rows: views.colour((x, x), rows),
    ):
        with pytest.raises(ValueError, match=message):
            make(images, indices)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_indices_may_be_a_tensor(dtype: torch.dtype, photographs: Tensor) -> None:
    views = TwoViews(image_size=8)
    assert_equal_views(
        views(photographs, torch.arange(16, dtype=dtype)), views(photographs, np.arange(16))
    )


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("imagenet", "^preset must be one of authors, paper, cifar.*, or a YAML file, got 'imagen"),
        (
            ViewRecipe(),
            r"^preset must be one of .*, got a single ViewRecipe; give .*, as \(recipe, ",
        ),
        (None, "^preset must be one of authors, .*, got None"),
        ({"fliip": 1}, "^preset must hold preset, x, x_prime, .*, got fliip"),
        (("cifar", "paper"), "^preset must be a name or a ViewRecipe for each view, got"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(preset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViews(preset=preset)


@pytest.mark.parametrize("recipes", [ViewRecipe(), None, "cifar", ["cifar"]])
def test_views_are_made_of_recipes(recipes: Any) -> None:
    with pytest.raises(ValueError, match=r"^recipes must be a ViewRecipe for each view, got "):
        RandomViews(8, recipes)


def test_there_is_a_view_to_make() -> None:
    with pytest.raises(ValueError, match="recipes must be of at least 1 view, got none"):
        RandomViews(8, ())


def test_two_views_are_two() -> None:
    three: Any = (NOTHING,) * 3
    with pytest.raises(ValueError, match="preset must have the recipes of 2 views, got 3"):
        TwoViews(8, three)


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
        ({"std": [[0.5], [0.1] * 4]}, r"std must have a number per channel, 3, got \[0.1"),
        ({"std": []}, r"std must have a number per channel, 3, got \[\]"),
        ({"std": [0.5, 0.0, 0.5]}, r"std must be above 0 for every channel, got \[0.5, 0.0, 0.5"),
        ({"std": [[0.5] * 3, [-1.0]]}, "std must be above 0 for every channel, got"),
        ({"std": 0.5}, "std must be a list with a number per channel, got 0.5"),
        ({"std": [[0.5], 0.5]}, "std must be a list with a number per channel, got 0.5"),
        ({"mean": torch.tensor(0.5)}, "mean must be a list with a number per channel, got 0.5"),
        ({"mean": [math.nan]}, r"mean must be finite numbers, one per channel, got \[nan\]"),
        ({"mean": [None] * 3}, "mean must be finite numbers, one per channel, got"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoViews(**settings)


@pytest.mark.parametrize("as_given", [np.array, torch.tensor, tuple])
def test_normalisation_may_be_an_array(as_given: Any, photographs: Tensor) -> None:
    mean, std = [0.5, 0.25, 0.125], [0.5, 0.25, 0.5]
    views = TwoViews(8, mean=as_given(mean), std=as_given(std))
    expected = TwoViews(8, mean=mean, std=std)(photographs, np.arange(16))
    assert_equal_views(views(photographs, np.arange(16)), expected)
