"""Compiled and plain views are the same views, with a compiler and without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photographs
from torch import Tensor
from workflow import environment

from vicreg_hf.views.kernels import Kernels
from vicreg_hf.views.presets import PRESETS, ViewRecipe
from vicreg_hf.views.two_views import TwoViews

EVERYTHING = ViewRecipe(flip=0.5, jitter=0.9, grayscale=0.3, blur=0.6, solarize=0.4)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return photographs(24, 40, 48)


@pytest.fixture(scope="module")
def fused() -> TwoViews:
    return TwoViews(32, (EVERYTHING, EVERYTHING), compile=True)


@pytest.mark.parametrize("count", [24, 7, 1])
def test_compiled_views_are_the_plain_ones_bit_for_bit(
    images: Tensor, fused: TwoViews, count: int
) -> None:
    plain, indices = TwoViews(32, (EVERYTHING, EVERYTHING)), np.arange(count)
    for epoch in range(3):
        expected = plain(images[:count], indices, epoch)
        for view, wanted in zip(fused(images[:count], indices, epoch), expected, strict=True):
            torch.testing.assert_close(view, wanted, rtol=0, atol=0)
    assert fused.kernels.compiled  # it did not fall back


SCRIPT = """
import sys, warnings
import numpy as np, torch
from vicreg_hf import TwoViews
images = torch.from_numpy(np.load(sys.argv[1]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    views = TwoViews(32, "authors", compile=True)
    fused = views(images, np.arange(len(images)))
assert not views.kernels.compiled
assert sum("without torch.compile" in str(w.message) for w in caught) == 1, caught
plain = TwoViews(32, "authors")(images, np.arange(len(images)))
assert all(torch.equal(a, b) for a, b in zip(fused, plain))
"""


def test_without_a_compiler_views_are_made_plainly(images: Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images.numpy())
    nowhere = environment(
        CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "images.npy")]
    result = subprocess.run(command, env=nowhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("preset", PRESETS)
def test_how_many_images_are_made_at_once_changes_nothing(
    preset: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, indices = TwoViews(32, preset), np.arange(24)
    expected = views(images, indices)
    monkeypatch.setattr("vicreg_hf.views.kernels.EAGER_ELEMENTS", 3 * 32 * 32 * 5)
    monkeypatch.setattr("vicreg_hf.views.random_views.ELEMENTS_AT_ONCE", 3 * 32 * 32 * 7)
    for view, wanted in zip(views(images, indices), expected, strict=True):
        torch.testing.assert_close(view, wanted, rtol=0, atol=0)


def test_an_error_of_the_operation_itself_is_not_hidden() -> None:
    def refuse(x: Tensor) -> Tensor:
        raise ValueError(f"never {len(x)}")

    with (
        pytest.warns(UserWarning, match="without torch.compile"),
        pytest.raises(ValueError, match="never 3"),
    ):
        Kernels(compiled=True)(refuse, torch.zeros(3, 3, 4, 4))
