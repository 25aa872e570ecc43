"""Data sets of every kind are found and opened."""

from __future__ import annotations

import io
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from hub import connected, running_hub
from pictures import photographs, png, table_of, write
from workflow import small_files

from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.splits import image_split
from vicreg_hf.features.encoders import open_encoder

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("full", [False, True])
def test_a_cache_that_cannot_be_written_is_not_the_data_sets_fault(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also root cannot make a folder where there is a file."""
    table = table_of([png(image) for image in photographs(20, 200, 200)])
    table.to_parquet(tmp_path / "train.parquet")
    (tmp_path / "file").touch()
    cache = tmp_path / ("cache" if full else "file") / "huggingface"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    with (
        small_files(2**19) if full else nullcontext(),
        pytest.raises(ValueError, match="cache of data sets must be writable") as caught,
    ):
        open_dataset(str(tmp_path / "train.parquet"))
    sentence = str(caught.value)
    number = "[Errno 27" if full else "[Errno "
    assert sentence.startswith(f"the cache of data sets must be writable, got {cache}: {number}")
    assert sentence.endswith(
        "; free some space, or set HF_HOME or HF_DATASETS_CACHE to another folder."
    )


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
    tables = open_dataset(str(tmp_path))
    split = image_split(tables, "train", dataset_name="tars", label_column="cls")
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


@pytest.mark.parametrize("name", ["[2024] *?", "parquet", "text"])
def test_names_of_folders_mean_nothing_to_datasets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither patterns, nor formats, for which `datasets` takes all that lies around them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="dataset_name must be"):
        open_dataset(name)
    encoded = [png(image) for image in photographs(3)]
    for folder in ("tar", "listed", "table/run/views", "other"):
        (tmp_path / name / folder).mkdir(parents=True)
    shard(tmp_path / name / "tar" / "train.tar", encoded)
    for folder in ("table", "listed", "other"):
        table_of([*encoded]).to_parquet(tmp_path / name / folder / "train.parquet")
    card = "---\nconfigs:\n- config_name: one\n  data_files: '*.parquet'\n---\n"
    (tmp_path / name / "listed" / "README.md").write_text(card)
    write(tmp_path / name / "table" / "run", ["config.yaml", "metrics.jsonl", "1.png", "2.png"])
    for folder in ("tar", "table", "listed", "tar/train.tar", "table/train.parquet"):
        splits = open_dataset(f"{name}/{folder}")
        assert {split: len(table) for split, table in splits.items()} == {"train": 3}, folder
    said = capsys.readouterr().err
    assert "that hold outputs of earlier runs are left out, 1 in all" in said
    assert said.count("warning: ") == 1


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


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_beside_the_images_are_left_alone(tmp_path: Path, streaming: bool) -> None:
    write(tmp_path, ["0.png", "1.png"])
    write(tmp_path, ["0.txt", "1.json"], b"{}")
    table = open_dataset(str(tmp_path), streaming=streaming)["train"]
    assert list(table.features) == ["image"]
    assert len(list(table)) == 2


def test_what_holds_no_data_is_named(tmp_path: Path) -> None:
    write(tmp_path, ["notes.txt"])
    for name, sentence in {
        "notes.txt": "a file must end in .parquet, .arrow, .tar",
        ".": "dataset_name must be demo, .* got '",
        "missing": "dataset_name must be demo, .*/missing'",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            open_dataset(str(tmp_path / name))


def test_a_folder_that_is_not_there_is_said_so_and_the_hub_asked_once(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        for name in (f"{tmp_path}/photo", "./photos", "a/b/c", "photos.zip", "my photos"):
            with pytest.raises(ValueError, match="there is no file or folder /"):
                open_dataset(name)
        assert not hub.requests  # none of these can be on the Hub
        with pytest.raises(ValueError, match=f"folder {tmp_path}/photo, but {tmp_path}/photos"):
            open_dataset(f"{tmp_path}/photo")
        with pytest.raises(ValueError, match=r"folder /.*, and the Hub has no data set my/photos"):
            open_dataset("my/photos")
        with pytest.raises(ValueError, match=r"is no directory here: the Hub has no model runs/r5"):
            open_encoder("runs/r5")
    assert [path for _, path in hub.requests if "harness" not in path] == [  # which is its own
        "/api/datasets/my/photos", "/api/models/runs/r5",
    ]  # fmt: skip
