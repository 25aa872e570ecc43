"""What a view depends on: the key of its image, and nothing else in the batch."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from seen import NOTHING
from torch import Tensor
from torch.nn import functional

from vicreg_hf.data.columns.image_files import decode_image, decode_reduced
from vicreg_hf.loss.local import cell_centres
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


def test_a_view_is_the_same_whatever_other_views_there_are(photographs: Tensor) -> None:
    recipes = multi_crop_recipes("authors", num_global_views=3, num_local_views=3)
    indices = np.arange(7, 23)
    sides = [40, 24, 32, 16, 20, 12]
    many = RandomViews[Any](sides, recipes, seed=2)
    crops = many.crop(list(photographs), indices, 3)
    made, halves = many(photographs, indices, 3), many.transform_crops(crops, indices, 3)
    for view, side in enumerate(sides):  # as the last of views that are otherwise different
        others = (NOTHING,) * view
        last = RandomViews[Any]([9] * view + [side], (*others, recipes[view]), seed=2)
        own = last.crop(list(photographs), indices, 3)
        assert torch.equal(own[view], crops[view])
        assert torch.equal(last.transform_crops(own, indices, 3)[view], halves[view])
        assert torch.equal(last(photographs, indices, 3)[view], made[view])
        assert made[view].shape == crops[view].shape == (16, 3, side, side)


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_places_say_where_in_the_image_a_view_shows_what(flip: float) -> None:
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(240), indexing="ij")
    image = torch.stack([rows, columns, 0 * rows]).to(torch.uint8)  # its levels are places
    recipes = (replace(NOTHING, scale=(0.2, 0.9), ratio=(0.7, 1.4), flip=flip),) * 3
    plain = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "seed": 1}
    views = RandomViews[Any]([64, 64, 32], recipes, places=True, **plain)
    indices = np.arange(6)
    *made, places = views(image.expand(6, -1, -1, -1), indices, 2)
    crops = views.crop([image] * 6, indices, 2)
    assert [x.shape for x in crops] == [x.shape for x in views.empty_crops(6)]
    assert torch.equal(views.transform_crops(crops, indices, 2)[-1], places)
    assert places.shape == (6, 3, 5)
    for view, shown in enumerate(made):
        cells = functional.adaptive_avg_pool2d(shown[:, :2], (4, 8)).flatten(2).mT
        found = cell_centres(places[:, view], 4, 8)
        # a pixel's level is that of its upper left corner, and levels are whole
        torch.testing.assert_close(cells + 0.5, found, rtol=0, atol=0.8)
    others = RandomViews[Any]([64, 64, 32], recipes, **plain)(
        image.expand(6, -1, -1, -1), indices, 2
    )
    assert len(others) == 3
    assert all(map(torch.equal, others, made))


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
    with monkeypatch.context() as patch:
        patch.setattr("vicreg_hf.views.random_views.PIXELS_AT_ONCE", at_once * 3 * 24 * 24)
        patch.setattr("vicreg_hf.views.kernels.PIXELS_AT_ONCE", 3 * 3 * 24 * 24)
        made = RandomViews(24, UNLIKE).transform_crops((crops,) * 4, indices, 2)
    for view, recipe in enumerate(UNLIKE):
        alone = RandomViews[tuple[Tensor]](24, (recipe,), numbers=[view])
        for rows in (slice(None), [3], [9, 3, 12]):
            few = alone.transform_crops((crops[rows],), indices[rows], 2)[0]
            assert torch.equal(made[view][rows], few)


@pytest.mark.parametrize("sides", [(24, 40), (24, 24)])
def test_branches_may_have_views_of_their_own_side_and_normalisation(
    sides: tuple[int, int], photographs: Tensor
) -> None:
    own: Any = {"mean": [(0.1, 0.2, 0.3), (0.5,)], "std": [(2, 3, 4), (0.5,)]}
    both = TwoViews(sides, "paper", **own)
    assert both.image_size == both.image_sizes == sides
    made = both(photographs, np.arange(16), 0)
    for view, side in enumerate(sides):
        one = {name: values[view] for name, values in own.items()}
        expected = TwoViews(side, "paper", **one)(photographs, np.arange(16), 0)[view]
        assert torch.equal(made[view], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_reduced_photographs_are_those_of_whole_ones(
    orientation: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vicreg_hf.views.reduced.REDUCED_FROM", 400_000)
    images = pictures.photographs(2, 203, 301)
    exif, scales = Image.Exif(), []
    exif[0x0112] = orientation
    views = TwoViews(48, (NOTHING, ViewRecipe(scale=(0.2, 1))), in_chans=channels)
    for index in range(6):
        file = io.BytesIO()
        whole = Image.fromarray(images[index % 2].permute(1, 2, 0).numpy()).resize((1003, 675))
        whole.save(file, "JPEG", quality=95, exif=exif)
        exact = decode_image(file.getvalue(), channels)
        reduced = decode_reduced(file.getvalue(), channels, views.reduction(index, 4))
        assert reduced is not None
        assert reduced.shape == exact.shape
        made = (views.crop([image], [index], 4) for image in (reduced, exact))
        for ours, expected in zip(*made, strict=True):
            apart = (ours.int() - expected.int()).abs()
            assert apart.float().mean() < 0.8  # half a pixel of the reduced image is more
            assert apart.max() < 40
        scales.append(reduced.scale)
        assert decode_reduced(file.getvalue()[:-900], channels, views.reduction(0)) is None
        with pytest.raises(ZeroDivisionError):  # a fault of ours is not taken for damage
            decode_reduced(file.getvalue(), channels, lambda height, _: height // 0)
    assert set(scales) == {2, 4}
    assert views.reduction(0)(632, 632) == 1  # smaller images stay as they are


def test_without_indices_views_follow_torchs_generator(photographs: Tensor) -> None:
    made = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made.append(TwoViews(image_size=32)(photographs)[0])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_images_given_are_left_as_they_are(photographs: Tensor) -> None:
    before = photographs.clone()
    views = TwoViews(image_size=80)
    views(photographs, np.arange(16), 0)
    square = photographs[:, :, :, :80].contiguous()
    made = views.transform_crops((square, square), np.arange(16))
    last = square.contiguous(memory_format=torch.channels_last)
    again = views.transform_crops((last, last), np.arange(16))
    assert all(map(torch.equal, again, made))
    assert torch.equal(square, before[:, :, :, :80])
    assert torch.equal(photographs, before)
