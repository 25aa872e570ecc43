"""Metadata files of folders and zips: each image keeps what belongs to it."""

from __future__ import annotations

import gc
import json
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from pictures import photographs, png, write, zipped

from vicreg_hf.data.columns.base import path_of
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.splits import image_split


def write_metadata(file: Path, **columns: list[Any]) -> None:
    table = pd.DataFrame(columns)
    if file.suffix == ".csv":
        table.to_csv(file, index=False)
    elif file.suffix == ".jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_parquet(file)


def undecoded(table: Any) -> list[dict[str, Any]]:
    for name, kind in table.features.items():
        if isinstance(kind, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        if isinstance(kind, datasets.List):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table.to_list()


def rows_of(place: Path) -> dict[str, list[dict[str, Any]]]:
    """What each split holds, images as their names."""
    splits = {name: undecoded(table) for name, table in open_dataset(str(place)).items()}
    for row in chain(*splits.values()):
        row["image"] = Path((path_of(row["image"]) or "").split("::")[0]).name
    return splits


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # theirs stay open
@pytest.mark.parametrize(
    ("suffix", "columns"),
    [
        (".csv", {"file_name": ["2.png", "1.png"], "caption": ["an oak", None]}),
        (".jsonl", {"left_file_name": ["1.png", "2.png"], "right_file_name": ["a/3.png", None],
                    "kind": [4, 5]}),
        (".jsonl", {"file_names": [["1.png", "2.png"], ["a/3.png"]], "caption": ["x", "y"]}),
        (".parquet", {"file_name": ["1.png", "a/3.png"], "mask_file_names": [[], ["2.png"]]}),
    ],
)  # fmt: skip
def test_rows_are_those_of_datasets(suffix: str, columns: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "pictures", ["1.png", "2.png", "a/3.png"])
    write_metadata(folder / f"metadata{suffix}", **columns)
    theirs: Any = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"), split="train"
    )
    ours = open_dataset(str(folder))["train"]
    assert set(ours.features) == set(theirs.features)
    assert {n: ours.features[n] for n in theirs.features} == theirs.features
    assert undecoded(ours) == undecoded(theirs)
    gc.collect()  # while the warnings of what `datasets` leaves open are passed over


@pytest.mark.parametrize(
    ("suffix", "in_zip"), [(".csv", True), (".jsonl", True), (".parquet", False)]
)
def test_a_metadata_file_above_the_splits_is_read(
    suffix: str, in_zip: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write(tmp_path / "pictures", ["train/1.png", "test/2.png", "test/3.png"])
    write_metadata(
        place / f"metadata{suffix}",
        file_name=["test/2.png", "train/1.png", "test/3.png"],
        caption=["an elm", "an oak", "an ash"],
    )
    if in_zip:
        place = zipped(place, tmp_path / "pictures.zip")
    assert rows_of(place) == {
        "train": [{"image": "1.png", "caption": "an oak"}],
        "test": [
            {"image": "2.png", "caption": "an elm"}, {"image": "3.png", "caption": "an ash"}
        ],
    }  # fmt: skip
    split = image_split(open_dataset(str(place)), "test", dataset_name="pictures")
    torch.testing.assert_close(split.read([1])[0], photographs(1)[0])
    assert not capsys.readouterr().err


def test_folders_are_classes_unless_the_metadata_has_some(tmp_path: Path) -> None:
    folder = write(tmp_path, ["elm/1.png", "oak/2.png"])
    for column, labels in {"caption": ["elm", "oak"], "label": ["tall", "small"]}.items():
        rows = {"file_name": ["elm/1.png", "oak/2.png"], column: ["tall", "small"]}
        write_metadata(folder / "metadata.csv", **rows)
        split = image_split(open_dataset(str(folder)), "train", dataset_name="pictures")
        assert split.labels is not None
        assert [split.label_names[k] for k in split.labels] == labels


def test_values_of_a_csv_stay_what_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path, ["a/1.png", "a/2.png", "3.png"])
    (folder / "metadata.csv").write_text(
        "\ufefffile_name, label,code,number,share,right,image,\n"
        ".\\a\\1.png, NA,007,3,0.5,True,x,\n"
        "a\\2.png, None,010,,1e-3,False,y,\n"
        "3.png,,100,-1,2,True,z,\n"
    )
    (table,) = open_dataset(str(folder)).values()
    names = ("image", "label", "code", "number", "share", "right")
    rows = [
        ("1.png", "NA", "007", 3, 0.5, True),
        ("2.png", "None", "010", None, 0.001, False),
        ("3.png", None, "100", -1, 2.0, True),
    ]
    assert rows_of(folder)["train"] == [dict(zip(names, row, strict=True)) for row in rows]
    split = image_split({"train": table}, "train", dataset_name="pictures")
    torch.testing.assert_close(split.read([0, 1, 2])[1], photographs(1)[0])


def test_images_that_no_metadata_lists_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, ["a/1.png", "a/2.png", "b/3.png"])
    lines = [{"file_name": "1.png", "caption": "an oak"}, {"file_name": "2.png"}]
    (folder / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert open_dataset(str(folder))["train"]["caption"][:] == ["an oak", None]
    warning = capsys.readouterr().err
    assert "warning: 1 of 3 images in " in warning
    assert f"{folder / 'b' / '3.png'} is the first" in warning
    write_metadata(folder / "b" / "metadata.jsonl", file_name=["3.png"], caption=["an ash"])
    assert len(open_dataset(str(folder))["train"]) == 3
    assert "warning" not in capsys.readouterr().err


def test_an_image_that_is_listed_and_not_there_is_a_bad_one(tmp_path: Path) -> None:
    folder = write(tmp_path, ["1.png"], png(photographs(2)[1]))
    write_metadata(
        folder / "metadata.csv", file_name=["1.png", "2.png", None], caption=["a", "b", "c"]
    )
    split = image_split(open_dataset(str(folder)), "train", dataset_name="pictures")
    images, bad = split.read_or_replace([0, 1, 2])
    assert len(images) == 3
    assert {(each.row, each.path) for each in bad} == {(1, str(folder / "2.png")), (2, None)}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name,caption\n1.png,x\n", r"must name its files in a column file_name of text, got n"),
        ("file_name\n1\n", r"must name files that are there, .* none of the 1 images in "),
        ("file_name,caption\n", r"a metadata file must have rows, got none in .*metadata\.csv"),
        ("", r"a metadata file must be readable, and .*metadata\.csv is not: No columns"),
        ("file_name;caption\n1.png;a, b\n", r"columns must be separated by commas, got ';'"),
        ("file_name,caption\n1.png,K\xe4tzchen\n", r"must be in UTF-8, so save it anew \(.*0xe4"),
        ("file_name\n../1.png\n", r"paths from its own folder, and .* names '\.\./1\.png'"),
        ("file_name\nC:\\1.png\n", r"paths from its own folder, and .* names 'C:"),
        ("file_name\nhttp://x/1.png\n", r"paths from its own folder, and .* names 'http://x"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(
    content: str, sentence: str, tmp_path: Path
) -> None:
    (write(tmp_path, ["1.png"]) / "metadata.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=sentence):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["Metadata.csv", "labels.tsv", "in a.zip", "beside a.zip"])
def test_a_table_that_is_not_read_is_told_of(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write(tmp_path / "in", ["1.png"])
    table = b"file_name,label\n1.png,3\n"
    if name == "in a.zip":
        place = zipped(write(place, ["labels.csv"], table), tmp_path / name)
    elif name == "beside a.zip":
        folder = write(tmp_path / "out", ["metadata.csv"], table)
        place = zipped(place, folder / name).parent
    else:
        write(place, [name], table)
    assert "label" not in open_dataset(str(place))["train"].column_names
    said = capsys.readouterr().err
    assert "is not read: what belongs to each of the images must be in a file called" in said
    assert "metadata.csv beside or above them, with a column file_name." in said


def test_several_metadata_files_are_read_together_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, ["train/1.wav", "test/2.wav"], b"no sound")
    write_metadata(folder / "train" / "metadata.csv", file_name=["1.wav"], caption=["a bell"])
    write_metadata(folder / "test" / "metadata.jsonl", file_name=["2.wav", "2.wav"], wide=[3, 4])
    splits = open_dataset(str(folder))
    assert isinstance(splits["train"].features["audio"], datasets.Audio)
    assert splits["train"].remove_columns("audio").to_list() == [
        {"caption": "a bell", "wide": None}
    ]
    assert splits["test"]["wide"][:] == [3, 4]
    said = capsys.readouterr().err
    assert "warning: 1 of 3 rows of metadata name sounds that others name too" in said
    write_metadata(folder / "train" / "metadata.csv", file_name=["1.wav"], wide=["large"])
    with pytest.raises(ValueError, match="metadata files must have columns of the same types, and"):
        open_dataset(str(folder))
    write_metadata(folder / "train" / "metadata.jsonl", file_name=["1.wav"])
    with pytest.raises(ValueError, match="a folder must have one metadata file, got "):
        open_dataset(str(folder))
