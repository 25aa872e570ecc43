"""Data sets of every kind are found and opened."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from pictures import photographs, png, table_of
from workflow import small_files

from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.splits import image_split


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's home; the variable is read on import."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_folder_of_parquet_files_gives_its_splits(tmp_path: Path) -> None:
    images = photographs(3)
    for name, rows in (("train", images), ("test", images[:1])):
        table_of([png(image) for image in rows]).to_parquet(tmp_path / f"{name}.parquet")
    splits = open_dataset(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 1}
    read = image_split(splits, "train", dataset_name=str(tmp_path)).read([2, 0])
    torch.testing.assert_close(torch.stack(read), images[[2, 0]], rtol=0, atol=0)


def test_class_folders_of_images_give_labels(tmp_path: Path) -> None:
    images = photographs(4)
    for row, folder in enumerate(["tulip", "china", "tulip", "china"]):
        path = tmp_path / folder / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(images[row]))
    split = image_split(open_dataset(str(tmp_path)), "train", dataset_name="flowers")
    assert split.label_names == ("china", "tulip")
    assert split.labels is not None
    by_class = {0: images[[1, 3]], 1: images[[0, 2]]}
    for row, label in enumerate(split.labels.tolist()):
        (read,) = split.read([row])
        assert any(torch.equal(read, image) for image in by_class[label])
    assert sorted(split.labels.tolist()) == [0, 0, 1, 1]


def test_a_folder_of_images_alone_has_no_labels(tmp_path: Path) -> None:
    for row, image in enumerate(photographs(3)):
        (tmp_path / f"{row}.png").write_bytes(png(image))
    split = image_split(open_dataset(str(tmp_path)), "train", dataset_name="photographs")
    assert len(split) == 3
    assert split.labels is None
    assert split.label_names == ()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_captions_beside_the_images_are_left_alone(
    tmp_path: Path, suffix: str, streaming: bool
) -> None:
    for row, image in enumerate(photographs(3)):
        (tmp_path / f"{row}.png").write_bytes(png(image))
        (tmp_path / f"{row}{suffix}").write_text(f'{{"key{row}": {row}}}')
    table = open_dataset(str(tmp_path), streaming=streaming)["train"]
    assert list(table.features) == ["image"]
    assert len(list(table)) == 3


def test_the_configs_of_a_card_decide_what_a_folder_is(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(photographs(1)[0]))
    (tmp_path / "names.csv").write_text("name\nrose\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: names.csv\n---\n"
    )
    assert list(open_dataset(str(tmp_path))["train"].features) == ["name"]


def test_what_save_to_disk_wrote_is_opened(tmp_path: Path) -> None:
    table = table_of([png(image) for image in photographs(3)])
    DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(tmp_path / "both")
    splits = open_dataset(str(tmp_path / "both"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 1}


def test_a_single_table_on_disk_becomes_the_split_train(tmp_path: Path) -> None:
    table_of([png(image) for image in photographs(3)]).save_to_disk(tmp_path / "one")
    splits = open_dataset(str(tmp_path / "one"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3}


@pytest.mark.parametrize("below", ["", "huggingface/datasets"])
def test_a_cache_that_cannot_be_written_is_not_the_data_sets_fault(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also root cannot make a folder where there is a file."""
    table_of([png(image) for image in photographs(3)]).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / below
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    with pytest.raises(ValueError, match="cache of data sets must be writable") as caught:
        open_dataset(str(tmp_path / "train.parquet"))
    sentence = str(caught.value)
    assert sentence.startswith(f"the cache of data sets must be writable, got {cache}: [Errno ")
    assert sentence.endswith(
        "; free some space, or set HF_HOME or HF_DATASETS_CACHE to another folder."
    )


def test_a_cache_that_is_full_is_not_the_data_sets_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of([png(image) for image in photographs(20, 200, 200)])
    table.to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    sentence = r"^the cache of data sets must be writable, got .*27"
    with small_files(2**19), pytest.raises(ValueError, match=sentence):
        open_dataset(str(tmp_path / "train.parquet"))


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_data_is_named(tmp_path: Path, name: str) -> None:
    folder = str(tmp_path / name)
    with pytest.raises(ValueError, match=f"dataset_name must be .* got '{re.escape(folder)}'"):
        open_dataset(folder)


def shard(path: Path, images: list[bytes], first: int = 0) -> None:
    """A WebDataset tar: 000000.jpg and 000000.cls, and so on."""
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(images, first):
            for extension, content in (("png", data), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_a_folder_of_webdataset_tars_gives_its_images_and_classes(tmp_path: Path) -> None:
    encoded = [png(image) for image in photographs(6)]
    shard(tmp_path / "train-000.tar", encoded[:4])
    shard(tmp_path / "train-001.tar", encoded[4:], first=4)
    split = image_split(
        open_dataset(str(tmp_path)), "train", dataset_name="tars", label_column="cls"
    )
    torch.testing.assert_close(torch.stack(split.read(range(6))), photographs(6), rtol=0, atol=0)
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar"])
def test_a_single_file_is_the_split_train(tmp_path: Path, suffix: str) -> None:
    encoded = [png(image) for image in photographs(3)]
    path = tmp_path / f"photographs.{suffix}"
    if suffix == "parquet":
        table_of([*encoded]).to_parquet(path)
    elif suffix == "arrow":
        table_of([*encoded]).save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    else:
        shard(path, encoded)
    split = image_split(open_dataset(str(path)), "train", dataset_name="photographs")
    torch.testing.assert_close(torch.stack(split.read(range(3))), photographs(3), rtol=0, atol=0)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match=r"a file must end in .parquet, .arrow, .tar"):
        open_dataset(str(tmp_path / "notes.txt"))


def test_nested_folders_of_images_are_searched(tmp_path: Path) -> None:
    for row, image in enumerate(photographs(4)):
        path = tmp_path / "2026" / f"week {row % 2}" / f"{row}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    split = image_split(open_dataset(str(tmp_path)), "train", dataset_name="photographs")
    assert len(split) == 4


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_file_that_is_no_image_is_found_when_it_is_read_and_not_before(
    tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "0.png").write_bytes(png(photographs(1)[0]))
    (tmp_path / f"1.{suffix}").write_text("<html>404</html>")
    split = image_split(open_dataset(str(tmp_path)), "train", dataset_name="photographs")
    images, bad = split.read_or_replace([0, 1])
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=0)
    assert bad[0].path is not None
    assert bad[0].path.endswith(f"1.{suffix}")


def test_a_folder_whose_card_lists_files_is_read_as_it_is(tmp_path: Path) -> None:
    """`datasets` alone gives the first of these three again."""
    train = {"split": "train", "path": "*.parquet"}
    card = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": [train]}]})
    for place, number in (("one", 1), ("other", 2), ("other", 3)):
        folder = tmp_path / place / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"---\n{card}---\n")
        Dataset.from_dict({"number": [number] * number}).to_parquet(folder / "train.parquet")
        assert open_dataset(str(folder))["train"]["number"][:] == [number] * number
