"""What a view depends on: the key of its image, and nothing else in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from seen import NOTHING, assert_equal_views
from torch import Tensor

from vicreg_hf.views.presets import ViewRecipe, multi_crop_recipes
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews


@pytest.mark.parametrize(
    ("seed", "index", "epoch"), [(1, 5, 3), (0, 6, 3), (0, 5, 4)], ids=["seed", "index", "epoch"]
)
def test_another_key_gives_other_views(
    seed: int, index: int, epoch: int, photographs: Tensor
) -> None:
    image = photographs[:1]
    one = TwoViews(image_size=32)(image, [5], 3)
    other = TwoViews(image_size=32, seed=seed)(image, [index], epoch)
    both = TwoViews(image_size=32, seed=seed)(image.repeat(2, 1, 1, 1), [9, index], [7, epoch])
    assert not torch.equal(one[0], one[1])
    for view in (0, 1):
        assert not torch.equal(one[view], other[view])
        # whatever else is in the batch, but for a level by which a crop is rounded otherwise
        assert (both[view][1:] - other[view]).abs().mean() < 1e-3


def whole_and_in_halves(
    views: RandomViews[tuple[Tensor, ...]], images: Tensor
) -> list[tuple[Tensor, ...]]:
    """The crops of each view, the views made of them, and the views made by one call."""
    indices = np.arange(7, 7 + len(images))
    crops = views.crop(list(images), indices, 3)
    made = views.transform_crops(crops, indices, 3)
    return list(zip(crops, made, views(images, indices, 3), strict=True))


def test_a_view_is_the_same_whatever_other_views_there_are(photographs: Tensor) -> None:
    recipes = multi_crop_recipes("authors", num_global_views=3, num_local_views=3)
    sides = [40, 24, 32, 16, 20, 12]
    many = whole_and_in_halves(RandomViews(sides, recipes, seed=2), photographs)
    for view in range(6):  # as the last of views that are otherwise different
        others = (NOTHING,) * view
        last = RandomViews([9] * view + [sides[view]], (*others, recipes[view]), seed=2)
        assert_equal_views(whole_and_in_halves(last, photographs)[view], many[view])
        assert many[view][0].shape == many[view][1].shape == (16, 3, sides[view], sides[view])


UNLIKE = (
    ViewRecipe(blur=0.5, blur_sigma=(0.1, 1.0), solarize=0.3),
    NOTHING,
    ViewRecipe(flip=0.9, blur=0.5, blur_sigma=(2.0, 4.0)),
    ViewRecipe(jitter=1.0, grayscale=0.5),
)
"""Recipes of views that are made together if they are of one side."""


@pytest.mark.parametrize("at_once", [5, 16, 47, 2**20])  # parts of a view, one, two, all
def test_views_made_together_are_those_made_alone(
    at_once: int, photographs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops, indices = photographs[:, :, :24, :24], np.arange(30, 46)
    together: RandomViews[tuple[Tensor, ...]] = RandomViews(24, UNLIKE)
    monkeypatch.setattr("vicreg_hf.views.random_views.PIXELS_AT_ONCE", at_once * 3 * 24 * 24)
    monkeypatch.setattr("vicreg_hf.views.kernels.PIXELS_AT_ONCE", 3 * 3 * 24 * 24)
    made = together.transform_crops((crops,) * 4, indices, 2)
    monkeypatch.undo()
    for view, recipe in enumerate(UNLIKE):
        alone = RandomViews[tuple[Tensor]](24, (recipe,), numbers=[view])
        assert torch.equal(made[view], alone.transform_crops((crops,), indices, 2)[0])
        for rows in ([3], [9, 3, 12], list(range(16))[::-1]):
            few = alone.transform_crops((crops[rows],), indices[rows], 2)[0]
            assert torch.equal(made[view][rows], few)


@pytest.mark.parametrize("sides", [(24, 40), (24, 24)])
def test_branches_may_have_views_of_their_own_side_and_normalisation(
    sides: tuple[int, int], photographs: Tensor
) -> None:
    own: Any = {"mean": [(0.1, 0.2, 0.3), (0.5,)], "std": [(2, 3, 4), (0.5,)]}
    both = TwoViews(sides, "paper", **own)
    assert both.image_size == both.image_sizes == sides
    made = both(photographs, np.arange(16))
    for view, side in enumerate(sides):
        one = {name: values[view] for name, values in own.items()}
        expected = TwoViews(side, "paper", **one)(photographs, np.arange(16))[view]
        assert torch.equal(made[view], expected)


def test_without_indices_views_follow_torchs_generator(photographs: Tensor) -> None:
    views = TwoViews(image_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = views(photographs)[0], views(photographs)[0]
        torch.manual_seed(0)
        repeated = views(photographs)[0]
    assert torch.equal(first, repeated)
    assert not torch.equal(first, second)


def test_the_images_given_are_left_as_they_are(photographs: Tensor) -> None:
    before = photographs.clone()
    views = TwoViews(image_size=80)
    views(photographs, np.arange(16))
    square = photographs[:, :, :, :80].contiguous()
    made = views.transform_crops((square, square), np.arange(16))
    last = square.contiguous(memory_format=torch.channels_last)
    assert_equal_views(views.transform_crops((last, last), np.arange(16)), made)
    assert torch.equal(square, before[:, :, :, :80])
    assert torch.equal(photographs, before)
