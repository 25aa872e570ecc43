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


def test_images_are_the_same_distinct_digits_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.NUM_IMAGES == {"train": 20_000, "test": 4_000}
    small, large = small_demo(monkeypatch, 30, 10), small_demo(monkeypatch, 300, 100)
    kinds = {"image": ImageFeature(), "label": ClassLabel(names=[*"0123456789"])}
    for name, split in large.items():
        assert split.features == kinds
        pixels = [np.array(Image.open(io.BytesIO(each))) for each in pngs(split)]
        assert {each.shape for each in pixels} == {(32, 32)}
        assert min(each.max() for each in pixels) > 128  # no digit is lost outside
        count = len(small[name])
        assert pngs(small[name]) == pngs(split)[:count]
        assert small[name]["label"][:] == split["label"][:count]
    assert len({*pngs(large["train"]), *pngs(large["test"])}) == 400


def test_no_scan_is_in_both_splits_and_labels_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits are drawn upright, at one size that leaves no room to move.

    So an image is a function of its scan: the inner 6 x 6 pixels, which are unique.
    """
    monkeypatch.setattr(demo, "MAX_ANGLE", 0.0)
    monkeypatch.setattr(demo, "SIZE_RANGE", (demo.SIDE / 0.75, demo.SIDE / 0.75))
    splits = small_demo(monkeypatch, 5000, 1000)
    train, test = set(pngs(splits["train"])), set(pngs(splits["test"]))
    assert not train & test
    assert 1300 < len(train) <= 1437  # of the 1437 scans, as equal scans give equal images
    assert 300 < len(test) <= 360
    scans, digits = load_digits(return_X_y=True)
    inner = scans.reshape(-1, 8, 8)[:, 1:7, 1:7].reshape(-1, 36)
    split = splits["test"].select(range(200))
    drawn = [Image.open(io.BytesIO(each)).resize((6, 6), Image.Resampling.BOX)
             for each in pngs(split)]  # fmt: skip
    found = np.stack([np.array(image).reshape(36) for image in drawn]) / 255 * 16
    nearest = np.abs(found[:, None] - inner).sum(-1).argmin(1)
    np.testing.assert_array_equal(digits[nearest], split["label"][:])
