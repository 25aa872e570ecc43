"""How often and how far views are cropped and coloured: the published distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from vicreg_hf.runtime.randomness import Stream, uniforms
from vicreg_hf.views.draws import NUM_UNIFORMS, draw_crops, draw_transforms
from vicreg_hf.views.presets import PRESETS, ViewRecipe

LARGEST = np.float32(1 - 2**-24)  # uniform there is


def random_uniforms(count: int) -> NDArray[np.float32]:
    return uniforms(np.arange(count), NUM_UNIFORMS, seed=0, stream=Stream.VIEW)


@pytest.mark.parametrize(
    ("height", "width"),
    [(120, 180), (40, 300), (200, 20)],  # the last two often need the central crop
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    scale = (0.08, 1.0)
    image, ratio = torch.empty(3, height, width), [3 / 4, 4 / 3]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, list(scale), ratio) for _ in range(1500)]
        )
    ours = draw_crops(random_uniforms(20_000), height, width, ViewRecipe(scale=scale))

    def measures(box: NDArray[np.int64]) -> list[Any]:
        """Area, ratio, top, left, and the last two as shares of their room."""
        top, left, h, w = box.T
        places = top / np.maximum(height - h, 1), left / np.maximum(width - w, 1)
        return [h * w, w / h, top, left, *places]

    for own, other in zip(measures(ours), measures(theirs), strict=True):
        result: Any = stats.ks_2samp(own, other)
        assert result.pvalue > 1e-3


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (3000, 1), (1, 3000), (3, 4), (100_000, 70_000)],
)
def test_a_crop_lies_inside_its_image_and_reaches_its_far_corner(height: int, width: int) -> None:
    u = random_uniforms(1000)
    extremes = [np.full_like(u[:1], fill) for fill in (0.0, 0.5, LARGEST)]
    boxes = draw_crops(np.concatenate([u, *extremes]), height, width, ViewRecipe())
    u[:, 20:22] = LARGEST  # top and left
    corner = draw_crops(u, 300, 400, ViewRecipe())
    np.testing.assert_array_equal(corner[:, :2] + corner[:, 2:], [[300, 400]] * 1000)
    top, left, h, w = boxes.T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(h, w) >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_without_a_fitting_attempt_the_crop_is_central() -> None:
    never = ViewRecipe(scale=(3.0, 3.0))  # larger than the image
    for height, width, expected in (
        (30, 300, [0, 130, 30, 40]),  # too wide: cut to 4/3 in the middle
        (300, 30, [130, 0, 40, 30]),  # too high: cut to 3/4 in the middle
        (30, 33, [0, 0, 30, 33]),  # within the ratio: whole
    ):
        boxes = draw_crops(random_uniforms(3), height, width, never)
        np.testing.assert_array_equal(boxes, [expected] * 3)


def test_every_image_of_a_batch_may_have_its_own_size() -> None:
    u, heights, widths = random_uniforms(3), [50, 1, 700], [80, 9, 20]
    together = draw_crops(u, heights, widths, ViewRecipe())
    alone = [draw_crops(u[[k]], heights[k], widths[k], ViewRecipe())[0] for k in range(3)]
    np.testing.assert_array_equal(together, alone)
    thin = ViewRecipe(ratio=(0.1, 0.2))  # which leaves no pixel
    np.testing.assert_array_equal(draw_crops(u, 1, 1, thin), [[0, 0, 1, 1]] * 3)


def test_operations_are_as_frequent_as_published() -> None:
    # vicreg@4e12602, augmentations.py; the paper's appendix C.1; solo-learn's recipe for CIFAR
    for recipe, blur, solarize in (
        (PRESETS["authors"].x, 1.0, 0.0),
        (PRESETS["authors"].x_prime, 0.1, 0.2),
        (PRESETS["paper"].x, 0.5, 0.1),
        (PRESETS["paper"].x_prime, 0.5, 0.1),
        (PRESETS["cifar"].x, 0.0, 0.1),
        (PRESETS["cifar"].x_prime, 0.0, 0.1),
    ):
        drawn = draw_transforms(random_uniforms(100_000), recipe)
        expected = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": blur}
        expected["solarize"] = solarize
        measured = {name: drawn[name].mean() for name in expected}
        assert measured == pytest.approx(expected, abs=0.008)  # five standard errors


@pytest.mark.parametrize("preset", ["authors", "paper", "cifar"])
def test_factors_are_uniform_over_the_published_ranges(preset: str) -> None:
    drawn = draw_transforms(random_uniforms(100_000), PRESETS[preset].x_prime)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), (0.1, 2.0)]
    for values, (low, high) in zip([*drawn["factors"].T, drawn["sigma"]], ranges, strict=True):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
        assert values.min() >= low - 1e-6
        assert values.max() <= high + 1e-6


def test_all_orders_of_the_jitter_are_equally_frequent() -> None:
    drawn = draw_transforms(random_uniforms(100_000), ViewRecipe())["order"]
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    other = draw_transforms(random_uniforms(100_000), ViewRecipe(solarize=0.5, jitter=0.1))
    np.testing.assert_array_equal(drawn, other["order"])  # no probability changes another draw
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (24, 1)))
    assert stats.chisquare(counts).pvalue > 1e-3
