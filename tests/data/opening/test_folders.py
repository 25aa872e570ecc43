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
from vicreg_hf.data.splits import ImageSplit, image_split

ALIKE = [
    "train/oak/1.png", "train/elm/2.png", "test/oak/3.png", "test/elm/4.png", "test/elm/5.jpg"
]  # fmt: skip


def opened(place: Path) -> dict[str, ImageSplit]:
    splits = open_dataset(str(place))
    return {name: image_split(splits, name, dataset_name="pictures") for name in splits}


def seen(split: ImageSplit) -> list[str]:
    """The class and the file of each image, as in elm/1.png."""
    paths = [path_of(cell) or "" for cell in split.cells(range(len(split)))]
    files = [os.path.basename(path.split("::")[0]) for path in paths]
    if split.labels is None:
        return files
    folders = [*(f"{name}/" for name in split.label_names), ""]  # -1 where there is none
    return [folders[k] + file for k, file in zip(split.labels, files, strict=True)]


PLACES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "splits": (ALIKE, {"train": ["elm/2.png", "oak/1.png"],
                       "test": ["elm/4.png", "elm/5.jpg", "oak/3.png"]}),
    "capitals, and a class less": (
        ["Train/oak/1.png", "Train/elm/2.png", "Test Set/oak/3.png"],
        {"train": ["elm/2.png", "oak/1.png"], "test": ["oak/3.png"]},
    ),
    "a class called train": (
        ["train/1.png", "car/2.png"], {"train": ["car/2.png", "train/1.png"]},
    ),
    "a class called train within splits": (
        ["train/train/1.png", "train/car/2.png", "test/train/3.png", "test/car/4.png"],
        {"train": ["car/2.png", "train/1.png"], "test": ["car/4.png", "train/3.png"]},
    ),
    "splits within classes": (
        ["oak/train/1.png", "elm/train/2.png", "oak/val/3.png", "elm/val/4.png"],
        {"train": ["elm/2.png", "oak/1.png"], "validation": ["elm/4.png", "oak/3.png"]},
    ),
    "a file called test": (["1.png", "my_test.jpg"], {"train": ["1.png", "my_test.jpg"]}),
    "splits by year": (
        ["images/train2017/1.jpg", "images/val2017/2.jpg", "images/train2014/0.jpg"],
        {"train": ["0.jpg", "1.jpg"], "validation": ["2.jpg"]},
    ),
    "other words for splits": (
        ["Training images/1.png", "imagenet-val/2.png", "EVAL/3.png"],
        {"train": ["1.png"], "validation": ["2.png"], "test": ["3.png"]},
    ),
    "words that are no splits": (
        ["trains/1.png", "train_val/2.png"], {"train": ["train_val/2.png", "trains/1.png"]},
    ),
    "some without a class": (
        ["train/oak/1.png", "train/elm/2.png", "unlabeled/3.png"],
        {"train": ["elm/2.png", "oak/1.png", "3.png"]},
    ),
    "a split without classes": (
        ["train/oak/1.png", "train/elm/2.png", "val/3.png"],
        {"train": ["elm/2.png", "oak/1.png"], "validation": ["3.png"]},
    ),
    "endings": (
        ["a/1.avif", "a/2.JPG", "a/3.jpeg", "b/4.webp", "b/5.heic", "b/notes.txt", "b/6.h5"],
        {"train": ["a/1.avif", "a/2.JPG", "a/3.jpeg", "b/4.webp", "b/5.heic"]},
    ),
    "hidden": (
        ["a/.hidden.png", "__MACOSX/a/._1.png", ".thumbs/1.png", "a/1.png"], {"train": ["1.png"]},
    ),
    "names that are patterns": (
        ["oak [0]/1.png", "elm ?/2.png", "*/3.png"],
        {"train": ["*/3.png", "elm ?/2.png", "oak [0]/1.png"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "expected"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
def test_every_image_is_in_a_split(
    in_zip: bool, names: list[str], expected: dict[str, list[str]], tmp_path: Path
) -> None:
    place = write(tmp_path / "pictures [1]", names)
    if in_zip:
        place = zipped(place, tmp_path / "pictures.zip")
    found = opened(place)
    assert {name: seen(split) for name, split in found.items()} == expected
    torch.testing.assert_close(next(iter(found.values())).read([0])[0], photographs(1)[0])


@pytest.mark.parametrize("names", [["1.png", "2.png"], ALIKE])
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
    assert seen(opened(tmp_path / "pictures")["train"]) == ["1.png"]


def test_zips_in_a_folder_are_read_if_they_are_all_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", ["oak/1.png", "elm/2.png"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("train", "test"):
        zipped(source, folder / f"{name}.zip")
    assert {name: seen(split) for name, split in opened(folder).items()} == {
        name: ["elm/2.png", "oak/1.png"] for name in ("train", "test")
    }
    assert not capsys.readouterr().err
    write(folder, ["3.png"])  # as what was unpacked stands beside its zip
    assert seen(opened(folder)["train"]) == ["3.png"]
    assert "warning: 2 zips in " in (warning := capsys.readouterr().err)
    assert f"{folder / 'test.zip'} is the first" in warning


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


def test_addresses_in_a_data_set_are_not_asked() -> None:
    names = ["http://127.0.0.1:9/1.png", "zip://1.png::http://127.0.0.1:9/a"]
    cells = [{"bytes": None, "path": name} for name in names]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": cells}, features)
    split = image_split({"train": table}, "train", dataset_name="strange")
    for row in range(2):
        with pytest.raises(ImageError, match="No such file"):
            split.read([row])


def test_processes_read_a_zip_at_once(tmp_path: Path) -> None:
    images = photographs(4)
    for row, image in enumerate(images):
        write(tmp_path / "source", [f"{row}.png"], png(image))
    archive = zipped(tmp_path / "source", tmp_path / "a.zip", compression=zipfile.ZIP_DEFLATED)
    split = opened(archive)["train"]
    split.read([0])  # opens it, before others are forked
    with ProcessPoolExecutor(2) as pool:
        for read in pool.map(split.read, [[3, 0, 2, 1]] * 20):
            torch.testing.assert_close(torch.stack(read), images[[3, 0, 2, 1]], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.zip", PNG, r"must be whole, and .*a.zip is not: File is not a"),
        ("a.txt", PNG, "dataset_name must be .* got '.*': "),
        ("caf\udce9/1.png", PNG, r"must be UTF-8, got b.*\\xe9/1.png"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_named(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_dataset(str(write(tmp_path, [name], content)))


def test_a_zip_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    archive = zipped(write(tmp_path / "source", ["notes.txt"]), tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"there are neither images nor sounds in .*a.zip"):
        open_dataset(str(archive))
    with pytest.raises(ValueError, match=r"has no configs; leave out dataset_config_name"):
        open_dataset(str(zipped(write(tmp_path / "source", ["1.png"]), archive)), "large")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("0.png", PNG)
        file.filelist[0].file_size = 2**31  # what the directory of the archive says
    with pytest.raises(ImageError, match="it has 2147483648 bytes, more than the 1073741824"):
        opened(archive)["train"].read([0])


@pytest.mark.parametrize(
    ("names", "sentence", "first"),
    [
        ([*ALIKE, "extra/6.png", "7.png"], "2 files are in no split", "7.png"),
        (["oak/1.png", "elm/2.png", "train.parquet"], "2 images in ", "elm/2.png"),
    ],
)
def test_images_that_are_left_out_are_told_of(
    names: list[str], sentence: str, first: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = write(tmp_path / "mixed", names)
    for table in folder.glob("*.parquet"):
        table_of([PNG] * 2).to_parquet(table)
    assert len(open_dataset(str(folder))["train"]) == 2
    assert f"warning: {sentence}" in (warning := capsys.readouterr().err)
    assert f"{folder / first} is the first" in warning


def test_sounds_are_found_like_images(tmp_path: Path) -> None:
    for name in ("train/owl/1.wav", "train/wren/2.flac", "test/wren/3.ogg"):
        soundfile.write(write(tmp_path, [name]) / name, np.sin(np.arange(8000) / 8), 8000)
    splits = open_dataset(str(tmp_path))
    assert splits["test"].features["label"] == ClassLabel(names=["owl", "wren"])
    assert splits["test"]["label"][:] == [1]  # though the split lacks the other class
    sound = SpectrogramSettings(sampling_rate=8000)
    split = image_split(splits, "train", dataset_name="x", channels=1, sound=sound)
    assert seen(split) == ["owl/1.wav", "wren/2.flac"]
    one, other = split.read([0, 1])
    assert one.shape == other.shape
    assert one.float().std() > 0
    write(tmp_path, ["train/wren/4.png"])  # where there are images, sounds are left alone
    assert seen(opened(tmp_path)["train"]) == ["4.png"]
