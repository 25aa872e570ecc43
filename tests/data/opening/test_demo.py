"""The embedded data set: always the same, and its test digits are new."""

from __future__ import annotations

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

from vicreg_hf.data.opening import demo


def pngs(split: Dataset) -> list[bytes]:
    rows = split.cast_column("image", ImageFeature(decode=False))["image"]
    return [row["bytes"] for row in rows]


def small_demo(monkeypatch: pytest.MonkeyPatch, train: int, test: int) -> DatasetDict:
    monkeypatch.setattr(demo, "NUM_IMAGES", {"train": train, "test": test})
    return demo.load_demo()


def test_the_full_data_set_has_24000_images() -> None:
    splits = demo.load_demo()
    assert {name: len(split) for name, split in splits.items()} == {"train": 20_000, "test": 4_000}


def test_columns_are_images_and_named_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in small_demo(monkeypatch, 20, 10).values():
        assert list(split.features) == ["image", "label"]
        assert isinstance(split.features["image"], ImageFeature)
        assert split.features["label"] == ClassLabel(names=list("0123456789"))


def test_images_are_32_pixels_square_and_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in small_demo(monkeypatch, 200, 100).values():
        for png in pngs(split):
            pixels = np.array(Image.open(io.BytesIO(png)))
            assert pixels.shape == (32, 32)
            assert pixels.max() > 128  # no digit is lost outside


def test_two_loads_are_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (small_demo(monkeypatch, 200, 100) for _ in range(2))
    for name in ("train", "test"):
        assert pngs(first[name]) == pngs(second[name])
        assert first[name]["label"][:] == second[name]["label"][:]


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = small_demo(monkeypatch, 30, 10), small_demo(monkeypatch, 300, 100)
    assert pngs(small["train"]) == pngs(large["train"])[:30]
    assert pngs(small["test"]) == pngs(large["test"])[:10]


def test_images_of_a_split_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = small_demo(monkeypatch, 2000, 500)
    assert len({*pngs(splits["train"]), *pngs(splits["test"])}) == 2500


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch) -> DatasetDict:
    """Digits drawn at one size that leaves no room to move, and upright.

    So an image is a function of its scan: the inner 6 x 6 pixels, which are unique.
    """
    monkeypatch.setattr(demo, "MAX_ANGLE", 0.0)
    monkeypatch.setattr(demo, "SIZE_RANGE", (demo.SIDE / 0.75, demo.SIDE / 0.75))
    return small_demo(monkeypatch, 20_000, 4_000)


def test_no_scan_is_in_both_splits(unmoved: DatasetDict) -> None:
    train, test = set(pngs(unmoved["train"])), set(pngs(unmoved["test"]))
    # Repeats show that equal scans give equal images; 80 % and 20 % of the scans all occur.
    assert (len(train), len(test)) == (1437, 360)
    assert not train & test


def test_a_label_is_that_of_the_scan_drawn(unmoved: DatasetDict) -> None:
    scans, digits = load_digits(return_X_y=True)
    inner = scans.reshape(-1, 8, 8)[:, 1:7, 1:7].reshape(-1, 36)
    split = unmoved["test"].select(range(200))
    drawn = [
        Image.open(io.BytesIO(png)).resize((6, 6), Image.Resampling.BOX) for png in pngs(split)
    ]
    found = np.stack([np.array(image).reshape(36) for image in drawn]) / 255 * 16
    nearest = np.abs(found[:, None] - inner).sum(-1).argmin(1)
    np.testing.assert_array_equal(digits[nearest], split["label"][:])
