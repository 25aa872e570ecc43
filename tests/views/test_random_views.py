"""What a view depends on: the key of its image, and nothing else in the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from seen import NOTHING, assert_equal_views, grey_levels
from torch import Tensor

from vicreg_hf.views.draws import draw_crops
from vicreg_hf.views.kernels import Kernels
from vicreg_hf.views.presets import PRESETS, ViewRecipe, multi_crop_recipes
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews


def test_views_do_not_depend_on_the_order_or_the_rest_of_the_batch(photographs: Tensor) -> None:
    views, indices = TwoViews(image_size=32), np.arange(100, 116)
    together = grey_levels(views(photographs, indices, 1))
    for rows in ([3], [9, 3, 12], list(range(16))[::-1]):
        apart = grey_levels(views(photographs[rows], indices[rows], 1))
        torch.testing.assert_close(apart, together[:, rows], rtol=0, atol=1.01)
        assert (apart - together[:, rows]).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("seed", "index", "epoch"), [(1, 5, 3), (0, 6, 3), (0, 5, 4)], ids=["seed", "index", "epoch"]
)
def test_another_key_gives_other_views(
    seed: int, index: int, epoch: int, photographs: Tensor
) -> None:
    image = photographs[:1]
    one = TwoViews(image_size=32)(image, [5], 3)
    other = TwoViews(image_size=32, seed=seed)(image, [index], epoch)
    for view in (0, 1):
        assert not torch.equal(one[view], other[view])


def test_one_view_is_the_first_of_two(photographs: Tensor) -> None:
    first, second, _ = PRESETS["authors"]
    one: RandomViews[tuple[Tensor]] = RandomViews(32, (first,), seed=2)
    two, indices = TwoViews(32, (first, second), seed=2), np.arange(16)
    (x,) = one(photographs, indices, 3)
    assert torch.equal(x, two(photographs, indices, 3)[0])
    (crop,), crops = one.crop(list(photographs), indices, 3), two.crop([*photographs], indices, 3)
    assert torch.equal(crop, crops[0])
    assert torch.equal(one.colour((crop,), indices, 3)[0], two.colour(crops, indices, 3)[0])


def whole_and_in_halves(
    views: RandomViews[tuple[Tensor, ...]], images: Tensor
) -> list[tuple[Tensor, ...]]:
    """Of each view the crops, what becomes of them, and what the call makes of the images."""
    indices = np.arange(7, 7 + len(images))
    crops = views.crop(list(images), indices, 3)
    made = views.colour(crops, indices, 3)
    return list(zip(crops, made, views(images, indices, 3), strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_two_of_many_views_are_the_two_views(preset: str, photographs: Tensor) -> None:
    recipes = multi_crop_recipes(preset, num_global_views=3, num_local_views=2)
    two = whole_and_in_halves(TwoViews(32, preset, seed=2), photographs)
    many = whole_and_in_halves(RandomViews([32, 32, 32, 16, 16], recipes, seed=2), photographs)
    for one, other in zip(two, many[:2], strict=True):
        assert_equal_views(one, other)


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


@pytest.mark.parametrize("at_once", [5, 16, 47, 48, 2**20])  # parts of a view, one, two, three, all
def test_views_made_together_are_those_made_alone(
    at_once: int, photographs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops, indices = photographs[:, :, :24, :24], np.arange(30, 46)
    together: RandomViews[tuple[Tensor, ...]] = RandomViews(24, UNLIKE)
    monkeypatch.setattr("vicreg_hf.views.random_views.ELEMENTS_AT_ONCE", at_once * 3 * 24 * 24)
    made = together.colour((crops,) * 4, indices, 2)
    monkeypatch.undo()
    for view, recipe in enumerate(UNLIKE):
        alone = RandomViews[tuple[Tensor]](24, (recipe,), numbers=[view])
        assert torch.equal(made[view], alone.colour((crops,), indices, 2)[0])
        for rows in ([3], [9, 3, 12], list(range(16))[::-1]):
            few = alone.colour((crops[rows],), indices[rows], 2)[0]
            assert torch.equal(made[view][rows], few)


def test_views_of_one_side_with_normalisations_of_their_own(photographs: Tensor) -> None:
    means = [(0.5,), (0.1, 0.2, 0.3), (0.5,)]
    crops, indices = photographs[:, :, :24, :24], np.arange(16)
    three = RandomViews[tuple[Tensor, ...]](24, UNLIKE[:3], mean=means)
    for view, made in enumerate(three.colour((crops,) * 3, indices)):
        alone = RandomViews[tuple[Tensor]](24, (UNLIKE[view],), mean=means[view], numbers=[view])
        assert torch.equal(made, alone.colour((crops,), indices)[0])


def test_crops_in_another_memory_format_give_the_same_views(photographs: Tensor) -> None:
    crops, views = photographs[:, :, :24, :24], TwoViews(24, "paper")
    last = crops.contiguous(memory_format=torch.channels_last)
    assert_equal_views(
        views.colour((last, last), np.arange(16)), views.colour((crops, crops), np.arange(16))
    )


@pytest.mark.parametrize("num_crops", [1, 3])
def test_there_is_a_crop_for_each_view(num_crops: int) -> None:
    crops: Any = (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),) * num_crops
    with pytest.raises(ValueError, match=r"zip\(\)"):
        TwoViews(8).colour(crops, [0, 1])


class Counted(Kernels):
    """Remember what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __call__(self, function: Any, *batch: Tensor, shared: tuple[Any, ...] = ()) -> Tensor:
        self.called.append(function.__name__)
        return super().__call__(function, *batch, shared=shared)


@pytest.mark.parametrize(
    ("sides", "operations"),
    [([8], 20), ([8] * 2, 20), ([8] * 2 + [4] * 3, 40)],  # for each side, 4 * 4 of them jitter
)
def test_further_views_of_a_side_take_no_further_operations(
    sides: list[int], operations: int
) -> None:
    views = RandomViews[tuple[Tensor, ...]](sides, (PRESETS["cifar"].x,) * len(sides))
    views.kernels = Counted()
    views(torch.zeros(512, 3, 8, 8, dtype=torch.uint8), np.arange(512))
    assert len(views.kernels.called) == len(sides) + operations  # each crop is one


def test_views_of_one_recipe_differ_from_one_another(photographs: Tensor) -> None:
    recipes = multi_crop_recipes("cifar", num_global_views=4)
    views = RandomViews[tuple[Tensor, ...]](32, recipes)(photographs, np.arange(16))
    for view in range(4):
        for other in range(view):
            assert ((views[view] - views[other]).abs().amax((1, 2, 3)) > 0).all()


def test_local_crops_are_as_small_as_their_recipe_says() -> None:
    recipes = multi_crop_recipes("authors", num_local_views=2)
    views: RandomViews[tuple[Tensor, ...]] = RandomViews(16, recipes)
    for view in (2, 3):
        u = views.uniforms(np.arange(5000), 0, view)
        _, _, height, width = draw_crops(u, 375, 500, views.recipes[view]).T
        area = height * width / (375 * 500)
        assert stats.kstest(area, stats.uniform(0.05, 0.09).cdf).pvalue > 1e-3


def test_branches_may_have_views_of_their_own_side_and_normalisation(photographs: Tensor) -> None:
    own: Any = {"mean": [(0.1, 0.2, 0.3), (0.5,)], "std": [(2, 3, 4), (0.5,)]}
    both = TwoViews([24, 40], "paper", **own)
    assert both.image_size == both.image_sizes == (24, 40)
    made = both(photographs, np.arange(16))
    for view, side in enumerate((24, 40)):
        one = {name: values[view] for name, values in own.items()}
        expected = TwoViews(side, "paper", **one)(photographs, np.arange(16))[view]
        assert torch.equal(made[view], expected)


def test_one_side_stays_a_number() -> None:
    views = TwoViews(24)
    assert views.image_size == 24
    assert views.image_sizes == (24, 24)


def test_compiled_views_of_different_sides_are_the_plain_ones(photographs: Tensor) -> None:
    only = replace(NOTHING, scale=(0.3, 1.0), flip=0.5, solarize=0.5)
    sides, indices = [32, 32, 16, 12], np.arange(16)
    plain, fused = (
        RandomViews[tuple[Tensor, ...]](sides, (only,) * 4, compile=compiled)
        for compiled in (False, True)
    )
    crops = plain.crop(list(photographs), indices)
    for _ in range(2):
        assert_equal_views(fused.colour(crops, indices), plain.colour(crops, indices))
    assert fused.kernels.compiled  # it did not fall back


@pytest.mark.parametrize("preset", PRESETS)
def test_the_two_views_of_an_image_differ(preset: str, photographs: Tensor) -> None:
    x, x_prime = TwoViews(image_size=32, preset=preset)(photographs, np.arange(16))
    assert ((x - x_prime).abs().amax((1, 2, 3)) > 0).all()


def test_every_image_may_have_its_own_epoch(photographs: Tensor) -> None:
    views = TwoViews(image_size=32)
    together = grey_levels(views(photographs[:2], [5, 6], [0, 1]))
    alone = [grey_levels(views(photographs[[k]], [5 + k], k)) for k in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=1.01)


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
    views.colour((square, square), np.arange(16))
    assert torch.equal(square, before[:, :, :, :80])
    assert torch.equal(photographs, before)
