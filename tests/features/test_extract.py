"""Features of whole data sets, against stock transformers."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from extracting import extract, files, load, write_encoder, write_folder
from pictures import photographs, png, table_of
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor, AutoModel
from workflow import small_files

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.features.encoders import open_encoder
from vicreg_hf.features.parts import write_part
from vicreg_hf.features.pictures import open_pictures
from vicreg_hf.features.search import nearest_images

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def again(encoder: Path, folder: Path) -> Callable[..., Path]:
    return partial(extract, encoder, folder)


@pytest.fixture(scope="module")
def extracted(again: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return again(tmp_path_factory.mktemp("features") / "whole")


def test_features_are_those_of_transformers(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    found = load(extracted, tmp_path)
    assert {name: len(table) for name, table in found.items()} == {"train": 36, "test": 2}
    table = found["train"]
    assert table.column_names == ["row", "image_id", "embedding", "label"]
    assert table.features["label"].names == ["cat", "dog"]
    assert table.features["embedding"].length == 96
    model: Any = AutoModel.from_pretrained(encoder)
    processor = AutoImageProcessor.from_pretrained(encoder)
    for row in table:
        assert (folder / row["image_id"]).is_file()
        assert Path(row["image_id"]).parent.name == table.features["label"].int2str(row["label"])
        picture = Image.open(folder / row["image_id"]).convert("RGB")
        with torch.no_grad():
            expected = model(**processor(picture, return_tensors="pt")).pooler_output[0]
        embedding = torch.tensor(row["embedding"])
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)
    assert sorted(set(range(37)) - set(table["row"])) == [36]
    (line,) = (extracted / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 36


def test_maps_are_those_of_timm_and_go_on_where_they_stopped(
    encoder: Path, again: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = again(tmp_path / "maps", features="map")
    table = load(output, tmp_path)["train"]
    assert table.column_names == [
        "row", "image_id", "feature_map", "map_height", "map_width", "label"
    ]  # fmt: skip
    kind = table.features["feature_map"]
    assert (kind.length, kind.feature.length, kind.feature.feature.dtype) == (4, 96, "float16")
    backbone: Any = timm.create_model(
        f"local-dir:{encoder}", pretrained=True, features_only=True, out_indices=[-1]
    )
    processor = AutoImageProcessor.from_pretrained(encoder)
    for row in (0, 7, 35):
        (at,) = np.flatnonzero(np.array(table["row"]) == row)
        cells = table[int(at)]
        assert (cells["map_height"], cells["map_width"]) == (2, 2)
        picture = Image.open(again.args[1] / cells["image_id"]).convert("RGB")
        with torch.no_grad():
            (expected,) = backbone.eval()(processor(picture, return_tensors="pt")["pixel_values"])
        found = torch.tensor(cells["feature_map"]).unflatten(0, (2, 2)).permute(2, 0, 1)
        torch.testing.assert_close(found, expected[0], rtol=2e-3, atol=2e-3)
    whole = files(output)
    names = sorted(name for name in whole if name.startswith("train"))
    (output / "data" / names[1]).unlink()
    (output / "data" / names[2]).write_bytes(whole[names[2]][:-100])
    again(output, features="map")
    assert files(output) == whole
    assert "is damaged and is made again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds others \(encoder, dtype differ\)"):
        again(output)
    with pytest.raises(ValueError, match="search compares pooled features"):
        nearest_images(output, [again.args[1] / "train" / "dog" / "00.png"])


def test_features_of_one_name_are_not_taken_for_each_other(extracted: Path, tmp_path: Path) -> None:
    """`datasets` has cached those of the first directory when it is asked for the second's."""
    for number in range(2):
        directory = tmp_path / str(number) / "features"
        shutil.copytree(extracted, directory)
        (path,) = (directory / "data").glob("test-*.parquet")
        table = datasets.Dataset.from_parquet(str(path)).map(lambda _, n=number: {"row": n})
        table.to_parquet(path)
        assert set(load(directory, tmp_path)["test"]["row"]) == {number}


def test_absent_and_damaged_parts_are_made_again(
    extracted: Path, again: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(extracted, output)
    names = [f"train-{number:05d}-of-00004.parquet" for number in range(4)]
    lost, cut, flipped, short = (output / "data" / name for name in names)
    (output / "data" / f".{lost.name}.partial").write_bytes(b"torn")
    lost.unlink()
    whole = bytearray(cut.read_bytes())
    cut.write_bytes(whole[: len(whole) // 2])
    whole = bytearray(flipped.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    flipped.write_bytes(whole)
    # a valid file of too few rows, as where images could not be used that now can
    write_part(short, pq.read_table(short).take([0, 1, 2, 3]))
    (kept,) = (output / "data").glob("test-*")
    written = kept.stat().st_mtime_ns
    (card := output / "README.md").unlink()
    card.mkdir()  # where a card cannot be written, the features are there
    again(output)
    said, warned = capsys.readouterr()
    assert f"warning: {card} is left out: " in warned
    for part in (cut, flipped, short):
        assert f"warning: {part} is damaged and is made again: " in said
    assert "made again: it lacks 2 images that can be used." in said
    assert said.count("made again") == 3
    assert "1 images could not be used and were left out" in said
    assert files(output) == files(extracted)
    assert kept.stat().st_mtime_ns == written
    assert (output / "bad_images.jsonl").read_text() == (extracted / "bad_images.jsonl").read_text()


def test_a_full_disk_costs_nothing_finished(
    extracted: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    most = max(map(len, files(extracted).values())) - 1
    sentence = r"output_dir must be .* written, got .*too large.* kept; free some space and start"
    with small_files(most), pytest.raises(ValueError, match=sentence):
        again(tmp_path / "out")
    again(tmp_path / "out")
    assert files(tmp_path / "out") == files(extracted)


def test_the_share_of_bad_images_is_judged_at_every_start(encoder: Path, tmp_path: Path) -> None:
    cells = [png(image) for image in photographs(8)]
    (tmp_path / "data").mkdir()
    for split, bad in {"train": (1, 6), "test": (1,)}.items():  # the same row, once in each
        table = table_of([b"" if k in bad else cells[k] for k in range(8)])
        table.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    places = (encoder, tmp_path / "data", tmp_path / "out")
    for _ in range(2):
        with pytest.raises(ImageError, match=r"max_bad_fraction=0.18 .* got 3 of 16. Mend or"):
            extract(*places, rows_per_file=1, max_bad_fraction=0.18)
    # as a kill leaves it: the list is written last
    (tmp_path / "out" / "bad_images.jsonl").unlink()
    (tmp_path / "out" / "data" / "train-00002-of-00008.parquet").unlink()
    for _ in range(2):
        extract(*places, rows_per_file=1, max_bad_fraction=0.19)
        lines = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
        assert {json.loads(line)["row"] for line in lines} == {1, 6}
    # a part of bad images alone is empty, and loads with the others
    found = load(tmp_path / "out", tmp_path)["train"]
    assert found["row"][:] == [0, 2, 3, 4, 5, 7]
    assert found["image_id"][:] == ["0", "2", "3", "4", "5", "7"]  # the images have no paths
    assert "label" not in found.column_names


def test_a_damaged_record_hinders_or_is_said(
    extracted: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    record = tmp_path / "extraction.json"
    record.write_text("[1]")
    again(tmp_path)  # nothing contradicts
    assert record.read_bytes() == (extracted / "extraction.json").read_bytes()
    record.write_text('{"encoder": "0c')
    with pytest.raises(ValueError, match=rf"{record} must say which .* damaged \(.*; delete it if"):
        again(tmp_path)
    assert files(tmp_path) == files(extracted)


def test_the_record_says_where_encoder_and_images_are_by_now(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    features = shutil.copytree(extracted, tmp_path / "features")
    path = features / "extraction.json"
    record = json.loads(path.read_text())
    del record["image_column"], record["dataset_config_name"]  # as an earlier version wrote it
    path.write_text(json.dumps(record))
    moved = shutil.copytree(folder, tmp_path / "moved")
    extract(encoder, moved, features, image_column="image")
    record = json.loads(path.read_text())
    assert (record["dataset_name"], record["image_column"]) == (str(moved), "image")
    assert record["dataset_config_name"] is None
    assert files(features) == files(extracted)
    assert open_pictures(record, open_encoder(str(encoder))).keys() == {"train", "test"}


def test_other_settings_are_not_mixed_in(extracted: Path, again: Callable[..., Path]) -> None:
    before = files(extracted)
    with pytest.raises(ValueError, match=r"holds others \(dtype, bf16 differ\)"):
        again(extracted, dtype="float16", bf16=True)
    assert files(extracted) == before


def test_half_precision_is_near(
    extracted: Path, again: Callable[..., Path], tmp_path: Path
) -> None:
    again(tmp_path / "out", dtype="float16", bf16=True, split="train")
    half = load(tmp_path / "out", tmp_path)
    assert list(half) == ["train"]
    assert half["train"].features["embedding"].feature.dtype == "float16"
    exact = np.array(load(extracted, tmp_path)["train"]["embedding"][:])
    near = np.array(half["train"]["embedding"][:], dtype=np.float64)
    cosine = (exact * near).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(near, axis=1)
    assert cosine.min() > 0.999
    assert not np.allclose(exact, near, rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"dtype": "int8"}, "dtype must be float32 or float16"),
        ({"push_to_hub": True}, "push_to_hub needs hub_dataset_id"),
        ({"split": "absent"}, "split must be one of train, test"),
    ],
)
def test_settings_that_cannot_be_are_said(
    setting: dict[str, Any], sentence: str, again: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        again(tmp_path, **setting)


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("kind", "train", "test", "read"),
    [
        (None, ["cat", "dog", "ant", "cat"], ["eel", "dog"], ["eel", "dog"]),
        (None, [3, 7, 3, 3], [7, 9, 7], ["7", "9", "7"]),
        (CLASSES, [0, 1, 1, 0], [1, -1], ["dog", None]),  # of which one has no class
    ],
)
def test_labels_mean_the_same_in_every_split(
    kind: Any, train: list[Any], test: list[Any], read: list[Any], encoder: Path, tmp_path: Path
) -> None:
    picture = tv.to_pil_image(photographs(1, 40, 40)[0])
    splits = {}
    for name, labels in {"train": train, "test": test}.items():
        table = datasets.Dataset.from_dict({"image": [picture] * len(labels), "label": labels})
        splits[name] = table if kind is None else table.cast_column("label", kind)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    column = None if kind else "label"
    output = extract(encoder, tmp_path / "data", tmp_path / "features", label_column=column)
    found = load(output, tmp_path)
    names = found["train"].features["label"].names
    # so that parts of others are not mixed in
    assert json.loads((output / "extraction.json").read_text())["classes"] == names
    of_train = [str(value) if kind is None else CLASSES.names[value] for value in train]
    assert [names[k] for k in found["train"]["label"]] == of_train
    assert [names[k] if k >= 0 else None for k in found["test"]["label"]] == read


def test_images_in_zips_are_named_as_in_a_folder(encoder: Path, tmp_path: Path) -> None:
    data, inside = tmp_path / "data", ["0.png", "1.png"]
    data.mkdir()
    for zipped in ("a.zip", "b.zip"):
        with zipfile.ZipFile(data / zipped, "w") as file:
            for name, image in zip(inside, photographs(2, 40, 40), strict=True):
                file.writestr(name, png(image))
    for given, expected in {
        data: ["a.zip/0.png", "a.zip/1.png", "b.zip/0.png", "b.zip/1.png"],
        data / "a.zip": inside,
    }.items():
        output = extract(encoder, given, tmp_path / f"features of {given.name}")
        assert load(output, tmp_path)["train"]["image_id"][:] == expected
