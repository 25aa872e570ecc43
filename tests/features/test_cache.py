"""Features are computed once, and again when anything that they depend on has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from measuring import digits, stock_features, write, write_encoder
from workflow import leave_behind

from vicreg_hf.data.labelled import open_labelled
from vicreg_hf.features import cache as feature_cache
from vicreg_hf.features.cache import Features, cached_features
from vicreg_hf.features.encoders import open_encoder

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images also as another split; six training images are no images."""
    (images, numbers), others = digits(range(24)), digits(range(24, 40))
    for row in (0, 4, 5, 6, 7, 19):
        images[row] = {"bytes": b"<html>", "path": None}
    folder = tmp_path_factory.mktemp("data")
    return write(folder, train=(images, numbers), test=others, validation=others)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def features(
    directory: Path, data: Path, cache: Path, *, test: str | None = None,
    label_column: str | None = None, **given: Any,
) -> tuple[dict[str, Features], int]:  # fmt: skip
    """The features, and how many images were encoded for them."""
    encoder = open_encoder(str(directory))
    opened = open_labelled(
        str(data), train_split="train", eval_split=test, label_column=label_column
    )
    splits = {"train": opened.train.split, "test": opened.test.split}
    seen: list[int] = []
    encoder.module.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    settings: dict[str, Any] = {"num_workers": 0, "max_bad_fraction": 0.15} | given
    found = cached_features(encoder, splits, cache, Accelerator(), **settings)
    return found, sum(seen)


def files(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def same(found: dict[str, Features], expected: dict[str, Features]) -> bool:
    return all(
        torch.equal(found[name].x, expected[name].x)
        and torch.equal(found[name].rows, expected[name].rows)
        for name in expected
    )


def test_features_are_those_of_the_encoder_and_are_computed_once(
    directory: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "ROWS_PER_FILE", 4)  # so that a file is of bad images alone
    first, seen = features(directory, data, tmp_path / "cache")
    assert seen == 18 + 16
    assert first["train"].rows.tolist() == [1, 2, 3, *range(8, 19), *range(20, 24)]
    assert first["train"].x.shape == (18, 96)
    assert first["test"].rows.tolist() == list(range(16))
    expected = torch.from_numpy(stock_features(directory, data, "test"))
    torch.testing.assert_close(first["test"].x, expected, rtol=1e-4, atol=1e-5)
    before = files(tmp_path / "cache")
    assert len(before) == 6 + 4
    left = leave_behind(next(iter(before)).parent, hours=2)
    again, seen = features(directory, data, tmp_path / "cache")
    assert seen == 0
    assert not left.exists()
    assert files(tmp_path / "cache") == before
    assert same(again, first)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cache_dir must be a directory that can be written, got"):
        features(directory, data, tmp_path / "file")


def test_encoders_and_splits_have_own_places(directory: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, _ = features(directory, data, cache)
    others: list[tuple[Path, dict[str, Any]]] = [
        (write_encoder(tmp_path / "weights", seed=1), {}),
        (write_encoder(tmp_path / "crop", crop_pct=0.5), {}),
        (directory, {"bf16": True}),
    ]
    for number, (model, given) in enumerate(others, 2):
        found, seen = features(model, data, cache, **given)
        assert seen == 34
        assert len(list(cache.iterdir())) == 2 * number
        assert not torch.equal(found["test"].x, first["test"].x)
    copy = write_encoder(tmp_path / "copy")  # the same encoder elsewhere
    again, seen = features(copy, data, cache, label_column="label")
    assert seen == 0
    assert same(again, first)
    other, seen = features(directory, data, cache, test="validation")
    assert seen == 16
    assert same(other, first)


def test_an_image_that_is_replaced_is_seen(directory: Path, tmp_path: Path) -> None:
    """In a table, in one that was saved, in files, and in files that a table only names."""
    images, numbers = digits(range(12))
    test, cache = digits(range(24, 32)), tmp_path / "cache"
    table, saved, named = (tmp_path / name for name in ("table", "saved", "named"))
    folder = tmp_path / "folder"
    for row, cell in enumerate([*images, *test[0]]):
        path = folder / ("train" if row < 12 else "test") / "ab"[row % 2] / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cell["bytes"])
    paths = [tmp_path / image["path"] for image in images]

    def save(row: int) -> None:
        write(table, train=(images, numbers), test=test)
        tables: Any = {n: Dataset.from_parquet(f"{table}/{n}.parquet") for n in ("train", "test")}
        DatasetDict(tables).save_to_disk(saved)
        paths[row].write_bytes(images[row]["bytes"])
        sorted(folder.glob("train/*/*.png"))[row].write_bytes(images[row]["bytes"])

    for row in range(12):
        save(row)
    cells = [{"bytes": None, "path": str(path)} for path in paths]
    write(named, train=(cells, numbers), test=test)
    places = (table, saved, folder, named)
    found = [features(directory, data, cache)[0] for data in places]
    (images[9],), _ = digits(range(50, 51))  # far from the first images
    save(9)
    for data, before in zip(places, found, strict=True):
        again, seen = features(directory, data, cache)
        assert seen >= 12
        changed = (again["train"].x != before["train"].x).any(1)
        assert changed.nonzero().flatten().tolist() == [9]
        assert torch.equal(again["test"].x, before["test"].x)
