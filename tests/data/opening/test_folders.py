"""Folders and zips of image files: no image is lost on the way to a split."""

from __future__ import annotations

import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel
from pictures import PNG, photographs, png, table_of, write, zipped

from vicreg_hf.data.columns.base import path_of
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.spectrograms import SpectrogramSettings
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.folders import split_of_folder
from vicreg_hf.data.splits import ImageSplit, image_split

ALIKE = [
    "train/oak/1.png", "train/elm/2.png", "test/oak/3.png", "test/elm/4.png", "test/elm/5.jpg"
]  # fmt: skip


def opened(place: Path) -> dict[str, ImageSplit]:
    splits = open_dataset(str(place))
    return {name: image_split(splits, name, dataset_name="pictures") for name in splits}


def seen(split: ImageSplit) -> list[tuple[str, str | None]]:
    """File and class of each image."""
    paths = [path_of(cell) or "" for cell in split.cells(range(len(split)))]
    files = [os.path.basename(path.split("::")[0]) for path in paths]
    names = split.label_names
    classes = [None] * len(split) if split.labels is None else [names[k] for k in split.labels]
    return list(zip(files, classes, strict=True))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(
            ALIKE,
            {"train": [("2.png", "elm"), ("1.png", "oak")],
             "test": [("4.png", "elm"), ("5.jpg", "elm"), ("3.png", "oak")]},
            id="splits",
        ),
        pytest.param(
            ["Train/oak/1.png", "Train/elm/2.png", "Test Set/oak/3.png"],
            {"train": [("2.png", "elm"), ("1.png", "oak")], "test": [("3.png", "oak")]},
            id="capitals, and a class less",
        ),
        pytest.param(
            ["train/1.png", "car/2.png"],
            {"train": [("2.png", "car"), ("1.png", "train")]},
            id="a class called train",
        ),
        pytest.param(
            ["test/1.png", "car/2.png"],
            {"train": [("2.png", "car"), ("1.png", "test")]},
            id="a class called test",
        ),
        pytest.param(
            ["train/train/1.png", "train/car/2.png", "test/train/3.png", "test/car/4.png"],
            {"train": [("2.png", "car"), ("1.png", "train")],
             "test": [("4.png", "car"), ("3.png", "train")]},
            id="a class called train within splits",
        ),
        pytest.param(
            ["oak/train/1.png", "elm/train/2.png", "oak/val/3.png", "elm/val/4.png"],
            {"train": [("2.png", "elm"), ("1.png", "oak")],
             "validation": [("4.png", "elm"), ("3.png", "oak")]},
            id="splits within classes",
        ),
        pytest.param(
            ["1.png", "my_test_shot.jpg"],
            {"train": [("1.png", None), ("my_test_shot.jpg", None)]},
            id="a file called test",
        ),
        pytest.param(
            ["images/train2017/1.jpg", "images/val2017/2.jpg", "images/train2014/0.jpg"],
            {"train": [("0.jpg", None), ("1.jpg", None)], "validation": [("2.jpg", None)]},
            id="splits by year",
        ),
        pytest.param(
            ["train/oak/1.png", "train/elm/2.png", "unlabeled/3.png"],
            {"train": [("2.png", None), ("1.png", None), ("3.png", None)]},
            id="some without a class",
        ),
        pytest.param(
            ["train/oak/1.png", "train/elm/2.png", "val/3.png"],
            {"train": [("2.png", "elm"), ("1.png", "oak")], "validation": [("3.png", None)]},
            id="a split without classes",
        ),
        pytest.param(
            ["a/1.avif", "a/2.JPG", "a/3.jpeg", "b/4.webp", "b/5.heic", "b/notes.txt", "b/6.h5"],
            {"train": [("1.avif", "a"), ("2.JPG", "a"), ("3.jpeg", "a"), ("4.webp", "b"),
                       ("5.heic", "b")]},
            id="endings",
        ),
        pytest.param(
            ["a/.hidden.png", "__MACOSX/a/._1.png", ".thumbs/1.png", "a/1.png"],
            {"train": [("1.png", None)]},
            id="hidden",
        ),
        pytest.param(
            ["oak [0]/1.png", "elm ?/2.png", "*/3.png"],
            {"train": [("3.png", "*"), ("2.png", "elm ?"), ("1.png", "oak [0]")]},
            id="names that are patterns",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
def test_every_image_is_in_a_split(
    in_zip: bool,
    names: list[str],
    expected: dict[str, list[tuple[str, str | None]]],
    tmp_path: Path,
) -> None:
    place = write(tmp_path / "pictures [1]", names)
    if in_zip:
        place = zipped(place, tmp_path / "pictures.zip")
    found = opened(place)
    assert {name: seen(split) for name, split in found.items()} == expected
    torch.testing.assert_close(next(iter(found.values())).read([0])[0], photographs(1)[0])


def test_images_in_no_split_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, [*ALIKE, "extra/6.png", "7.png"])
    assert {name: len(split) for name, split in opened(folder).items()} == {"train": 2, "test": 3}
    warning = capsys.readouterr().err
    assert warning.startswith("warning: 2 images are in no split")
    assert f"{folder / '7.png'} is the first" in warning


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["oak/1.png", "elm/2.png"], ALIKE])
def test_images_come_in_the_order_of_datasets(names: list[str], tmp_path: Path) -> None:
    """So that a run goes on with the rows it began with."""
    folder = write(tmp_path / "pictures", names)
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache")
    )
    ours = open_dataset(str(folder))
    assert list(ours) == list(theirs)
    for split, table in ours.items():
        assert table.features == theirs[split].features
        undecoded = (t.cast_column("image", datasets.Image(decode=False))[:]
                     for t in (table, theirs[split]))  # fmt: skip
        assert len(set(map(repr, undecoded))) == 1


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "oak").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "pictures")
    assert seen(opened(tmp_path / "pictures")["train"]) == [("1.png", None)]


@pytest.mark.parametrize("name", ["caf\udce9/1.png", "oak/\udce9t\udce9.png"])
@pytest.mark.parametrize("in_zip", [False, True])
def test_names_that_are_not_utf_8_are_named(name: str, in_zip: bool, tmp_path: Path) -> None:
    """As archives of other systems leave them behind."""
    if in_zip:
        pictures = write(tmp_path / "e", ["1.png"])
        (tmp_path / "d" / name).parent.mkdir(parents=True)
        zipped(pictures, tmp_path / "d" / name.replace(".png", ".zip"))
    else:
        write(tmp_path / "d", ["ash/1.png", "ash/2.png", name])
    with pytest.raises(ValueError, match=r"UTF-8, got b.*\\xe9"):
        open_dataset(str(tmp_path / "d"))


def test_zips_in_a_folder_are_read_if_they_are_all_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", ["oak/1.png", "elm/2.png"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("train", "test"):
        zipped(source, folder / f"{name}.zip")
    assert {name: seen(split) for name, split in opened(folder).items()} == {
        name: [("2.png", "elm"), ("1.png", "oak")] for name in ("train", "test")
    }
    assert not capsys.readouterr().err
    write(folder, ["3.png"])  # as what was unpacked stands beside its zip
    assert [name for name, _ in seen(opened(folder)["train"])] == ["3.png"]
    assert "warning: 2 zips in " in (warning := capsys.readouterr().err)
    assert f"{folder / 'test.zip'} is the first" in warning


def test_images_beside_tables_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "mixed", ["oak/1.png", "elm/2.png"])
    table_of([PNG] * 3).to_parquet(folder / "train.parquet")
    assert len(open_dataset(str(folder))["train"]) == 3
    assert "warning: 2 images in " in (warning := capsys.readouterr().err)
    assert f"{folder / 'elm' / '2.png'} is the first" in warning


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_processes_read_a_zip_at_once(compression: int, tmp_path: Path) -> None:
    images = photographs(4)
    for row, image in enumerate(images):
        write(tmp_path / "source", [f"{row}.png"], png(image))
    split = opened(zipped(tmp_path / "source", tmp_path / "a.zip", compression=compression))[
        "train"
    ]
    split.read([0])  # opens it, before others are forked
    with ProcessPoolExecutor(4) as pool:
        for read in pool.map(split.read, [[3, 0, 2, 1]] * 40):
            torch.testing.assert_close(torch.stack(read), images[[3, 0, 2, 1]], rtol=0, atol=0)


def test_what_is_damaged_in_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    archive = zipped(write(tmp_path / "source", ["1.png", "2.png"]), tmp_path / "a.zip")
    content = bytearray(archive.read_bytes())
    content[content.index(PNG) + len(PNG) // 2] ^= 255
    archive.write_bytes(content)
    split = opened(archive)["train"]
    with pytest.raises(ImageError, match=r"the file cannot be read: Bad CRC-32"):
        split.read([0])
    assert split.read([1])[0].shape == photographs(1)[0].shape
    images, bad = split.read_or_replace([0, 1])
    torch.testing.assert_close(images[0], images[1])
    assert bad[0].path == f"zip://1.png::{archive}"


def test_a_file_in_a_zip_that_would_be_huge_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("0.png", PNG)
        file.filelist[0].file_size = 2**31  # what the directory of the archive says
    with pytest.raises(ImageError, match="it has 2147483648 bytes, more than the 1073741824"):
        opened(tmp_path / "a.zip")["train"].read([0])


def test_a_zip_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(PNG)
    for place in (tmp_path, tmp_path / "a.zip"):
        with pytest.raises(ValueError, match=r"must be whole, and .*a.zip is not: File is not a"):
            open_dataset(str(place))


def test_a_zip_without_images_is_named(tmp_path: Path) -> None:
    archive = zipped(write(tmp_path / "source", ["notes.txt"]), tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"there are neither images nor sounds in .*a.zip"):
        open_dataset(str(archive))


@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
def test_sounds_are_found_like_images(in_zip: bool, tmp_path: Path) -> None:
    tone = np.sin(np.arange(8000) / 8)
    for name in ("train/owl/1.wav", "train/wren/2.flac", "test/owl/3.ogg"):
        path = tmp_path / "sounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone, 8000)
    place = tmp_path / "sounds"
    if in_zip:
        place = zipped(place, tmp_path / "sounds.zip")
    splits = open_dataset(str(place))
    settings = SpectrogramSettings(sampling_rate=8000)
    found = {
        name: image_split(splits, name, dataset_name="x", channels=1, sound=settings)
        for name in splits
    }
    assert {name: seen(split) for name, split in found.items()} == {
        "train": [("1.wav", "owl"), ("2.flac", "wren")], "test": [("3.ogg", "owl")]
    }  # fmt: skip
    one, other = found["train"].read([0, 1])
    assert one.shape == other.shape
    assert one.float().std() > 0


def test_images_are_seen_where_there_are_sounds_too(tmp_path: Path) -> None:
    write(tmp_path, ["owl/1.wav", "owl/1.png", "wren/2.png", "wren/2.wav"])
    assert seen(opened(tmp_path)["train"]) == [("1.png", "owl"), ("2.png", "wren")]


def test_a_config_of_image_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no configs; leave out dataset_config_name"):
        open_dataset(str(write(tmp_path, ["1.png"])), "large")


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/1.png", "zip://1.png::http://127.0.0.1:9/a"])
def test_addresses_in_a_data_set_are_not_asked(name: str) -> None:
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": name}]}, features)
    split = image_split({"train": table}, "train", dataset_name="strange")
    with pytest.raises(ImageError, match="No such file"):
        split.read([0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", "train"), ("Training images", "train"), ("train2017", "train"),
        ("dev", "validation"), ("imagenet-val", "validation"), ("EVAL", "test"),
        ("trains", None), ("train_val", None), ("contest", None), ("", None),
    ],
)  # fmt: skip
def test_folders_are_called_after_splits(name: str, expected: str | None) -> None:
    assert split_of_folder(name) == expected


def test_classes_keep_their_numbers_where_a_split_lacks_one(tmp_path: Path) -> None:
    folder = write(tmp_path, ["train/a/1.png", "train/b/2.png", "test/b/3.png", "test/b/4.png"])
    splits = open_dataset(str(folder))
    assert splits["test"].features["label"] == ClassLabel(names=["a", "b"])
    assert splits["test"]["label"][:] == [1, 1]
