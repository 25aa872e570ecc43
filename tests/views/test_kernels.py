"""Compiled and eager views are the same views, with a compiler and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import photographs
from torch import Tensor
from torch._inductor import config as inductor

from vicreg_hf.views.kernels import Kernels
from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.two_views import TwoViews

HUE = ViewRecipe(
    flip=0.0, jitter=0.9, brightness=0.0, contrast=0.0, saturation=0.0, grayscale=0.0
)  # the operation with most to round
EVERYTHING = ViewRecipe(flip=0.5, jitter=0.9, grayscale=0.3, blur=0.6, solarize=0.4)


@pytest.mark.parametrize("recipe", [HUE, pytest.param(EVERYTHING, marks=pytest.mark.slow)])
def test_compiled_views_are_the_eager_ones_bit_for_bit(recipe: ViewRecipe) -> None:
    images = photographs(24, 40, 48)
    eager, fused = (TwoViews(16, (recipe, recipe), compile=c) for c in (False, True))
    for count, epoch in ((24, 0), (7, 1), (1, 2)):
        indices = np.arange(count)
        expected = eager(images[:count], indices, epoch)
        for view, wanted in zip(fused(images[:count], indices, epoch), expected, strict=True):
            torch.testing.assert_close(view, wanted, rtol=0, atol=0)
    assert fused.kernels.compiled  # it did not fall back


def test_without_a_compiler_the_result_is_the_eager_one() -> None:
    def invert(x: Tensor) -> Tensor:
        return 254 - x  # nothing that another test has compiled

    kernels, x = Kernels(compiled=True), torch.arange(24).view(2, 3, 2, 2)
    with (
        inductor.patch({"cpp.cxx": ("no-compiler",), "fx_graph_cache": False}),
        pytest.warns(UserWarning, match="views are made without torch.compile, which failed: "),
    ):
        assert torch.equal(kernels(invert, x), 254 - x)
    assert not kernels.compiled
