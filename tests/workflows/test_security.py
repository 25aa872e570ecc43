"""Files that a stranger wrote: nothing in them is executed, and nothing fills the memory."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import load_from_disk
from extracting import extract
from families import trained
from hostile import plant, write_tar
from hub import WRITER, connected, running_hub
from PIL import Image
from workflow import train, write_images

from vicreg_hf import VICRegModel
from vicreg_hf.benchmarks.measuring import peak_extra_mib
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.hub.source import find_encoder
from vicreg_hf.publishing.loading import load_model
from vicreg_hf.settings.command_line import parse_arguments


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    plant(tmp_path / "bomb.pt", tmp_path / "marker", as_torch_file=True)
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file of a bomb, which must not go off."""
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "VICRegModel": lambda model, _: VICRegModel.from_pretrained(model),
    "publish": lambda model, _: load_model(find_encoder(model)),
    "extract": lambda model, other: extract(model, write_images(other / "data"), other / "out"),
    "timm": lambda model, _: timm.create_model(f"local-dir:{model}", pretrained=True),
}


@pytest.mark.parametrize("name", ["model.safetensors", "expander.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("reader", READERS)
def test_no_file_of_an_encoder_is_unpickled(
    reader: str, name: str, marker: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    trained().save_pretrained(model)
    assert READERS[reader](model, tmp_path) is not None  # there is something to read
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    for as_torch_file in (True, False):
        plant(model / name, marker, as_torch_file=as_torch_file)
        with suppress(Exception):  # refused or passed over
            READERS[reader](model, tmp_path)


@pytest.mark.parametrize("name", ["train.pkl", "train.pt", "train.npy"])
def test_a_pickle_is_no_data_set(name: str, marker: Path, tmp_path: Path) -> None:
    plant(tmp_path / "data" / name, marker)
    for source in (tmp_path / "data", tmp_path / "data" / name):
        with pytest.raises(ValueError, match="dataset_name must be"):
            open_dataset(str(source))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("field", ["pyd", "pickle", "pkl", "pth", "npy", "npz"])
def test_no_field_of_a_tar_is_unpickled(
    field: str, streaming: bool, marker: Path, tmp_path: Path
) -> None:
    plant(tmp_path / "bomb", marker, as_torch_file=field == "pth")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    bomb = (tmp_path / "bomb").read_bytes()
    write_tar(tmp_path / "data.tar", {"0.png": buffer.getvalue(), f"0.{field}": bomb})
    with suppress(Exception):  # refused or passed over
        list(open_dataset(str(tmp_path / "data.tar"), streaming=streaming)["train"])


def test_files_of_a_saved_table_are_not_unpickled(marker: Path, tmp_path: Path) -> None:
    open_dataset(str(write_images(tmp_path / "images")))["train"].save_to_disk(tmp_path / "table")
    assert len(load_from_disk(str(tmp_path / "table"))) == 64
    for path in (tmp_path / "table").iterdir():
        copy = shutil.copytree(tmp_path / "table", tmp_path / f"copy of {path.name}")
        plant(copy / path.name, marker)
        with suppress(ValueError):
            list(open_dataset(str(copy))["train"])


@pytest.mark.parametrize("flag", ["--config", "--augmentation"])
def test_yaml_makes_no_objects(flag: str, marker: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ValueError, match="must be valid YAML"):
        parse_arguments([f"{flag}={file}"])


def test_a_run_writes_no_pickle_and_shows_no_token(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_steps=2", "--push_to_hub=true", "--hub_model_id=org/name"]
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        train(images, tmp_path / "run", *flags)
    printed = capfd.readouterr()
    assert "Published: " in printed.out
    assert WRITER not in printed.out + printed.err
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    endings = {path.suffix for path in written}
    assert endings <= {".json", ".jsonl", ".safetensors", ".yaml", ".md", ".png", ""}
    for path in written:
        assert WRITER.encode() not in path.read_bytes(), path


# Memory


@pytest.mark.parametrize("streaming", [True, False])
def test_compressed_files_within_a_tar_are_refused(streaming: bool, tmp_path: Path) -> None:
    write_tar(tmp_path / "data.tar", {"0.png.gz": gzip.compress(bytes(2**20))})
    for source in (tmp_path, tmp_path / "data.tar"):
        with pytest.raises(ValueError, match=r"not compressed once more, got 0.png.gz"):
            open_dataset(str(source), streaming=streaming)


def claim_sizes(archive: Path, size: int, count: int) -> None:
    """A zip whose directory says that each of its empty files has that size."""
    with zipfile.ZipFile(archive, "w") as file:
        for row in range(count):
            file.writestr(f"{row}.png", b"")
        for entry in file.filelist:
            entry.file_size = size


@pytest.mark.parametrize(("size", "count", "message"), [
    (2**30 + 1, 1, r"at most 1073741824 bytes, got 0.png with .*data.zip"),
    (2**30, 2000, "an archive must fit on the disk"),
])  # fmt: skip
def test_zips_are_refused_by_the_sizes_they_claim(
    size: int, count: int, message: str, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "tables")  # beside which `datasets` would unpack it
    claim_sizes(folder / "data.zip", size, count)
    with pytest.raises(ValueError, match=message):
        open_dataset(str(folder))


def test_huge_files_in_a_tar_are_refused_by_their_headers(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("0.png")
    entry.size = 2**31
    with (tmp_path / "data.tar").open("wb") as sparse:
        sparse.write(entry.tobuf())
        sparse.truncate(2**31 + 10240)
    with pytest.raises(ValueError, match=r"at most 1073741824 bytes, got 0.png with .*data.tar"):
        open_dataset(str(tmp_path / "data.tar"))


def test_huge_files_and_bombs_among_images_leave_the_memory_flat(tmp_path: Path) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    for row in range(16):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:02d}.png")
    with (folder / "90.png").open("wb") as sparse:
        sparse.truncate(3 * 2**30)
    Image.new("1", (20_000, 20_000)).save(folder / "91.png")  # 400 million pixels in 50 kB
    flags = ["--image_size=32", "--batch_size=8", "--max_steps=2", "--max_bad_fraction=0.5"]
    risen = peak_extra_mib(lambda: train(folder, run, *flags), torch.device("cpu"))
    assert risen is None or risen < 1000
    listed = map(json.loads, (run / "bad_images.jsonl").read_text().splitlines())
    reasons = {Path(bad["path"]).name: bad["reason"] for bad in listed}
    assert "more than the 1073741824 allowed" in reasons["90.png"]
    assert "400000000 pixels" in reasons["91.png"]
