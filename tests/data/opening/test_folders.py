"""Folders and zips of image files: no image is lost on the way to a split."""

from __future__ import annotations

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


def seen(place: Path) -> dict[str, str]:
    """The split and the class of each file, in the order of the rows."""
    found = {}
    for name, split in opened(place).items():
        for row, cell in enumerate(split.cells(range(len(split)))):
            label = -1 if split.labels is None else int(split.labels[row])
            kind = f" {split.label_names[label]}" if label >= 0 else ""
            file = (path_of(cell) or "").split("::")[0]
            found[file.removeprefix("zip://").removeprefix(f"{place}/")] = name + kind
    return found


PLACES = {
    "words for splits, and a class less": {
        "Train/elm/2.png": "train elm", "Training images/oak/1.png": "train oak",
        "imagenet-val/oak/4.png": "validation oak", "EVAL/oak/3.png": "test oak",
        "Test Set/oak/5.png": "test oak",
    },
    "a class called train": {"car/2.png": "train car", "train/1.png": "train train"},
    "a class called train within splits": {
        "train/car/2.png": "train car", "train/train/1.png": "train train",
        "test/car/4.png": "test car", "test/train/3.png": "test train",
    },
    "splits within classes": {
        "elm/train/2.png": "train elm", "oak/train/1.png": "train oak",
        "elm/val/4.png": "validation elm", "oak/val/3.png": "validation oak",
    },
    "a file called test": {"1.png": "train", "my_test.jpg": "train"},
    "splits by year": {
        "images/train2014/0.jpg": "train", "images/train2017/1.jpg": "train",
        "images/val2017/2.jpg": "validation",
    },
    "words that are no splits": {
        "train_val/2.png": "train train_val", "trains/1.png": "train trains",
    },
    "some without a class": {
        "train/elm/2.png": "train elm", "train/oak/1.png": "train oak", "unlabeled/3.png": "train",
    },
    "a test split beside the classes": {
        "elm/2.png": "train elm", "oak/1.png": "train oak",
        "test/elm/4.png": "test elm", "test/oak/3.png": "test oak",
    },
    "a class called test": {"car/2.png": "train car", "test/1.png": "train test"},
    "a split without classes": {
        "train/elm/2.png": "train elm", "train/oak/1.png": "train oak", "val/3.png": "validation",
    },
    "endings": {
        "a/1.avif": "train a", "a/2.JPG": "train a", "a/3.jpeg": "train a", "b/4.webp": "train b",
        "b/5.heic": "train b", "b/notes.txt": None, "b/6.h5": None,
    },
    "hidden": {
        "a/.hidden.png": None, "__MACOSX/a/._1.png": None, ".thumbs/1.png": None,
        "a/1.png": "train",
    },
    "names that are patterns": {
        "*/3.png": "train *", "elm ?/2.png": "train elm ?", "oak [0]/1.png": "train oak [0]",
    },
}  # fmt: skip


@pytest.mark.parametrize("expected", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
def test_every_image_is_in_a_split(
    in_zip: bool, expected: dict[str, str | None], tmp_path: Path
) -> None:
    place = write(tmp_path / "pictures [1]", [*expected])
    if in_zip:
        place = zipped(place, tmp_path / "pictures.zip")
    assert list(seen(place).items()) == [(k, v) for k, v in expected.items() if v is not None]
    first = next(iter(opened(place).values()))
    torch.testing.assert_close(first.read([0])[0], photographs(1)[0])


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
    assert seen(tmp_path / "pictures") == {"oak/1.png": "train"}


def test_zips_in_a_folder_are_read_if_they_are_all_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "source", ["oak/1.png", "elm/2.png"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("train", "test"):
        zipped(source, folder / f"{name}.zip")
    splits = opened(folder)
    assert [split.label_names for split in splits.values()] == [("elm", "oak")] * 2
    assert [path_of(cell) for cell in splits["test"].cells(range(2))] == [
        f"zip://{name}::{folder / 'test.zip'}" for name in ("elm/2.png", "oak/1.png")
    ]
    assert not capsys.readouterr().err
    write(folder, ["3.png"])  # as what was unpacked stands beside its zip
    assert seen(folder) == {"3.png": "train"}
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
        file.writestr(".", b"")  # the folder itself, which some programs add
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
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1]
    one, other = split.read([0, 1])
    assert one.shape == other.shape
    assert one.float().std() > 0
    write(tmp_path, ["train/wren/4.png"])  # where there are images, sounds are left alone
    assert seen(tmp_path) == {"train/wren/4.png": "train"}
