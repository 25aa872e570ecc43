"""Files that a stranger wrote: nothing in them is executed, and nothing fills the memory."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import load_from_disk
from hub import WRITER, connected, running_hub
from PIL import Image
from workflow import SMALL, environment, write_images

from vicreg_hf import VICRegConfig, VICRegModel, pretrain
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.features.extract import extract_dataset
from vicreg_hf.publishing.loading import find_encoder, load_model
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.extraction import ExtractionArguments


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def plant(file: Path, marker: Path, *, as_torch_file: bool = False) -> None:
    """Put a bomb where something harmless is expected, pickled alone or in a file of torch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if as_torch_file:
        torch.save(Bomb(marker), file)
    else:
        file.write_bytes(pickle.dumps(Bomb(marker), protocol=2))  # torch's own


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    plant(tmp_path / "bomb.pt", tmp_path / "marker", as_torch_file=True)
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    config = VICRegConfig(architecture="test_resnet", expander_dims=[8])
    VICRegModel(config).save_pretrained(directory)
    return directory


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "VICRegModel": lambda model, _: VICRegModel.from_pretrained(model),
    "publish": lambda model, _: load_model(find_encoder(model)),
    "extract": lambda model, other: extract_dataset(
        ExtractionArguments(str(model), str(write_images(other / "data")), str(other / "out"))
    ),
    "timm": lambda model, _: timm.create_model(f"local-dir:{model}", pretrained=True),
}


@pytest.mark.parametrize("name", ["model.safetensors", "expander.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("reader", READERS)
def test_no_file_of_an_encoder_is_unpickled(
    reader: str, name: str, encoder: Path, tmp_path: Path
) -> None:
    if reader != "extract":  # else the test would pass because there is nothing to read
        assert READERS[reader](encoder, tmp_path) is not None
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(encoder, model)
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    for as_torch_file in (True, False):
        plant(model / name, marker, as_torch_file=as_torch_file)
        with suppress(Exception):  # refused or passed over
            READERS[reader](model, tmp_path)
        assert not marker.exists()


@pytest.mark.parametrize("name", ["train.pkl", "train.pt", "train.npy"])
def test_a_pickle_is_no_data_set(name: str, tmp_path: Path) -> None:
    plant(tmp_path / "data" / name, tmp_path / "marker")
    for source in (tmp_path / "data", tmp_path / "data" / name):
        with pytest.raises(ValueError, match="dataset_name must be"):
            open_dataset(str(source))
    assert not (tmp_path / "marker").exists()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("field", ["pyd", "pickle", "pkl", "pth", "npy", "npz"])
def test_no_field_of_a_tar_is_unpickled(field: str, streaming: bool, tmp_path: Path) -> None:
    plant(tmp_path / "bomb", tmp_path / "marker", as_torch_file=field == "pth")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    files = {"png": buffer.getvalue(), field: (tmp_path / "bomb").read_bytes()}
    write_tar(
        tmp_path / "data.tar", {f"{row}.{k}": v for row in range(4) for k, v in files.items()}
    )
    with suppress(ValueError):
        for table in open_dataset(str(tmp_path / "data.tar"), streaming=streaming).values():
            with suppress(Exception):
                list(table)
    assert not (tmp_path / "marker").exists()


def test_files_of_a_saved_table_are_not_unpickled(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    open_dataset(str(tmp_path / "images"))["train"].save_to_disk(tmp_path / "table")
    names = sorted(path.name for path in (tmp_path / "table").iterdir())
    assert len(load_from_disk(str(tmp_path / "table"))) == 64
    for name in names:
        copy = tmp_path / f"copy of {name}"
        shutil.copytree(tmp_path / "table", copy)
        plant(copy / name, tmp_path / "marker")
        with suppress(ValueError):
            list(open_dataset(str(copy))["train"])
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("flag", ["--config", "--augmentation"])
def test_yaml_makes_no_objects(flag: str, tmp_path: Path) -> None:
    file, marker = tmp_path / "recipe.yaml", tmp_path / "marker"
    file.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ValueError, match="must be valid YAML"):
        parse_arguments([f"{flag}={file}"])
    assert not marker.exists()


def test_a_run_writes_no_pickle_and_shows_no_token(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, directory = write_images(tmp_path / "images"), tmp_path / "run"
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        pretrain(parse_arguments([
            *SMALL, f"--dataset_name={folder}", "--max_steps=2", f"--output_dir={directory}",
            "--push_to_hub=true", "--hub_model_id=org/name",
        ]))  # fmt: skip
    printed = capfd.readouterr()
    assert "Published: " in printed.out
    assert WRITER not in printed.out + printed.err
    written = [path for path in directory.rglob("*") if path.is_file()]
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


def test_huge_files_in_archives_are_refused_by_their_headers(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as file:
        entry = tarfile.TarInfo("0.png")
        entry.size = 2**31
        file.fileobj.write(entry.tobuf())  # pyright: ignore[reportOptionalMemberAccess]
    with (tmp_path / "data.tar").open("ab") as sparse:
        sparse.truncate(2**31 + 10240)
    with (
        zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("0.png", "w", force_zip64=True) as inside,
    ):
        for _ in range(2**4 + 1):
            inside.write(bytes(2**26))
    with pytest.raises(ValueError, match=r"at most 1073741824 bytes, got 0.png with .*data.tar"):
        open_dataset(str(tmp_path / "data.tar"))
    beside = write_images(tmp_path / "tables")  # so that `datasets` would unpack it
    shutil.move(tmp_path / "data.zip", beside)
    with pytest.raises(ValueError, match=r"at most 1073741824 bytes, got 0.png with .*data.zip"):
        open_dataset(str(beside))


def test_a_zip_that_claims_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "tables")  # without which zips are not unpacked
    with zipfile.ZipFile(folder / "data.zip", "w") as file:
        for row in range(2000):
            file.writestr(f"{row}.png", b"")
        for entry in file.filelist:  # what the directory of the archive says
            entry.file_size = 2**30
    with pytest.raises(ValueError, match="an archive must fit on the disk"):
        open_dataset(str(folder))


RESIDENT = """
import resource, sys
from vicreg_hf import PretrainingArguments, pretrain
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    pretrain(PretrainingArguments(
        dataset_name=sys.argv[1], output_dir=sys.argv[2], architecture="test_resnet", batch_size=8,
        expander_dims="8-8", image_size=32, num_workers=0, max_steps=2, max_bad_fraction=0.5,
    ))
except Exception as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_huge_files_and_bombs_among_images_leave_the_memory_flat(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for row in range(16):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:02d}.png")
    with (folder / "90.png").open("wb") as sparse:
        sparse.truncate(3 * 2**30)
    Image.new("1", (30_000, 30_000)).save(folder / "91.png")  # 900 million pixels in 110 kB
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(folder), str(tmp_path / "run")],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    reasons = {Path(bad["path"]).name: bad["reason"] for bad in map(json.loads, listed)}
    assert "more than the 1073741824 allowed" in reasons["90.png"]
    assert "900000000 pixels" in reasons["91.png"]
    assert int(done.stdout.splitlines()[-1]) < 1000  # MiB
