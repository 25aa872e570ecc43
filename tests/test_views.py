"""The distribution of the views, their pixels against PIL's, and what they depend on."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from vicreg_hf.augmentation import (
    NUM_UNIFORMS,
    ORDERS,
    PRESETS,
    ColourParameters,
    ViewRecipe,
    draw_colour,
    draw_crops,
    multi_crop_recipes,
)
from vicreg_hf.kernels import Kernels
from vicreg_hf.randomness import Stream, uniforms
from vicreg_hf.views import RandomViews, TwoViews

LARGEST = np.float32(1 - 2**-24)  # uniform there is
NOTHING = ViewRecipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """(16, 3, 80, 120) uint8 pieces of two photographs."""
    bundle: Any = load_sample_images()
    pieces = [
        image[y : y + 80, x : x + 120]
        for image in bundle.images
        for y in (0, 160, 320)
        for x in (0, 240, 480)
    ]
    return torch.from_numpy(np.stack(pieces[:16])).permute(0, 3, 1, 2).contiguous()


def random_uniforms(count: int) -> NDArray[np.float32]:
    return uniforms(np.arange(count), NUM_UNIFORMS, seed=0, stream=Stream.VIEW)


def grey_levels(views: tuple[Tensor, Tensor]) -> Tensor:
    """Undo the normalisation; both views as (2, B, 3, S, S)."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (torch.stack(views) * std + mean) * 255


def assert_same_picture(ours: Tensor, expected: Tensor, *, atol: float) -> None:
    """At most atol grey levels apart anywhere, and half a level on average."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    assert (ours - expected).abs().mean() <= 0.5


# --- crops


@pytest.mark.parametrize(
    ("height", "width"),
    [(120, 180), (90, 90), (40, 300), (200, 20)],  # the last two often need the central crop
)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0)])
def test_crops_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    image, ratio = torch.empty(3, height, width), [3 / 4, 4 / 3]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, list(scale), ratio) for _ in range(4000)]
        )
    ours = draw_crops(random_uniforms(20_000), height, width, ViewRecipe(scale=scale))
    for measure in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: box[:, 3] / box[:, 2],  # ratio
        lambda box: box[:, 0],  # top
        lambda box: box[:, 1],  # left
        lambda box: box[:, 0] / np.maximum(height - box[:, 2], 1),  # top within its room
        lambda box: box[:, 1] / np.maximum(width - box[:, 3], 1),  # left within its room
    ):
        result: Any = stats.ks_2samp(measure(ours), measure(theirs))
        assert result.pvalue > 1e-3


@pytest.mark.parametrize("preset", ["authors", "cifar"])
@pytest.mark.parametrize("fill", [0.0, 0.5, LARGEST, None])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 2), (2, 1), (3000, 1), (1, 3000), (3, 4), (4096, 4097), (100_000, 70_000)],
)
def test_a_crop_lies_inside_its_image(
    height: int, width: int, fill: float | None, preset: str
) -> None:
    u = random_uniforms(1000)
    if fill is not None:
        u = np.full_like(u[:1], fill)
    top, left, h, w = draw_crops(u, height, width, PRESETS[preset][0]).T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(h, w) >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_the_largest_uniform_reaches_the_far_corner() -> None:
    u = random_uniforms(100)
    u[:, 20:22] = LARGEST  # top and left
    top, left, h, w = draw_crops(u, 300, 400, ViewRecipe()).T
    np.testing.assert_array_equal(top + h, 300)
    np.testing.assert_array_equal(left + w, 400)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (30, 300, (0, 130, 30, 40)),  # too wide: cut to 4/3 in the middle
        (300, 30, (130, 0, 40, 30)),  # too high: cut to 3/4 in the middle
        (30, 33, (0, 0, 30, 33)),  # within the ratio: whole
    ],
)
def test_without_a_fitting_attempt_the_crop_is_central(
    height: int, width: int, expected: tuple[int, ...]
) -> None:
    never = ViewRecipe(scale=(3.0, 3.0))  # larger than the image
    np.testing.assert_array_equal(draw_crops(random_uniforms(3), height, width, never)[0], expected)


def test_a_crop_has_a_pixel_even_where_the_ratio_leaves_none() -> None:
    thin = ViewRecipe(ratio=(0.1, 0.2))
    np.testing.assert_array_equal(draw_crops(random_uniforms(9), 1, 1, thin), [[0, 0, 1, 1]] * 9)


def test_every_image_of_a_batch_may_have_its_own_size() -> None:
    u, heights, widths = random_uniforms(3), [50, 1, 700], [80, 9, 20]
    together = draw_crops(u, heights, widths, ViewRecipe())
    alone = [draw_crops(u[[k]], heights[k], widths[k], ViewRecipe())[0] for k in range(3)]
    np.testing.assert_array_equal(together, alone)


# --- colour


# vicreg@4e12602, augmentations.py; the paper's appendix C.1; solo-learn's recipe for CIFAR
@pytest.mark.parametrize(
    ("preset", "view", "expected"),
    [
        ("authors", 0, {"blur": 1.0, "solarize": 0.0}),
        ("authors", 1, {"blur": 0.1, "solarize": 0.2}),
        ("paper", 0, {"blur": 0.5, "solarize": 0.1}),
        ("paper", 1, {"blur": 0.5, "solarize": 0.1}),
        ("cifar", 0, {"blur": 0.0, "solarize": 0.1}),
        ("cifar", 1, {"blur": 0.0, "solarize": 0.1}),
    ],
)
def test_operations_are_as_frequent_as_published(
    preset: str, view: int, expected: dict[str, float]
) -> None:
    drawn = draw_colour(random_uniforms(100_000), PRESETS[preset][view])
    common = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2}
    measured = {name: getattr(drawn, name).mean() for name in common | expected}
    assert measured == pytest.approx(common | expected, abs=0.008)  # five standard errors


@pytest.mark.parametrize("preset", ["authors", "paper", "cifar"])
@pytest.mark.parametrize("view", [0, 1])
def test_factors_are_uniform_over_the_published_ranges(preset: str, view: int) -> None:
    drawn = draw_colour(random_uniforms(100_000), PRESETS[preset][view])
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*drawn.factors.T, drawn.sigma], ranges, strict=True):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
        assert values.min() >= low - 1e-6
        assert values.max() <= high + 1e-6


def test_all_orders_of_the_jitter_are_equally_frequent() -> None:
    drawn = draw_colour(random_uniforms(100_000), ViewRecipe()).order
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (24, 1)))
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("fill", [0.0, LARGEST])
def test_extreme_uniforms_stay_within_the_recipe(fill: float) -> None:
    drawn = draw_colour(np.full((1, NUM_UNIFORMS), fill, np.float32), replace(NOTHING, blur=1.0))
    assert drawn.blur.all()  # probability one
    assert not (drawn.flip | drawn.jitter | drawn.grayscale | drawn.solarize).any()  # zero
    assert drawn.order[0].tolist() in ORDERS.tolist()


def test_changing_one_probability_changes_nothing_else_that_is_drawn() -> None:
    u = random_uniforms(1000)
    one, other = draw_colour(u, ViewRecipe()), draw_colour(u, ViewRecipe(solarize=0.5))
    assert one.solarize.sum() != other.solarize.sum()
    for name in ("flip", "jitter", "order", "factors", "grayscale", "blur", "sigma"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# --- pixels


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


# --- keys


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


def assert_equal_views(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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
    monkeypatch.setattr("vicreg_hf.views.ELEMENTS_AT_ONCE", at_once * 3 * 24 * 24)
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


# --- errors


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


# --- other numbers of channels


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
