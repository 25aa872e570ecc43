"""Extractions as users start them: on several processes, killed, refused and pushed."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from extracting import SETTINGS, extract, files, load, write_encoder, write_folder
from hub import READER, WRITER, running_hub
from warm import Script, run_script
from workflow import run

from vicreg_hf.runtime.output_dir import claim


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def extracted(encoder: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(encoder, folder, tmp_path_factory.mktemp("features") / "whole")


def command(encoder: Path, folder: Path, output: Path, *flags: str) -> list[str]:
    settings = [f"--{name}={value}" for name, value in (SETTINGS | {"num_workers": 1}).items()]
    places = [f"--model={encoder}", f"--dataset_name={folder}", f"--output_dir={output}"]
    return ["scripts/extract_features.py", *places, *settings, *flags]


def test_two_processes_write_the_same(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    done = run_script(*command(encoder, folder, tmp_path / "out"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = load(extracted, tmp_path), load(tmp_path / "out", tmp_path)
    assert files(extracted).keys() == files(tmp_path / "out").keys()
    for split in ("train", "test"):
        for column in ("row", "image_id", "label"):
            assert one[split][column][:] == two[split][column][:]
        a, b = (np.array(table[split]["embedding"][:]) for table in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_killed_at_any_moment_it_ends_with_the_same_features(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = command(encoder, folder, output)
    for parts in (1, 3):
        process = Script(words)
        while len(list(output.glob("data/t*.parquet"))) < parts and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert files(extracted).items() <= files(output).items()


def test_a_directory_in_use_is_refused(encoder: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    left = output / "data" / ".train-00000-of-00004.parquet.17.partial"
    with claim(output):
        left.parent.mkdir()
        left.write_bytes(b"of the first")
        done = run_script(*command(encoder, folder, output))
        assert done.returncode == 1
        assert done.stderr.endswith(
            f"error: output_dir must not be in use by another run, and {output} is; wait for it, "
            "stop it, or choose another output_dir.\n"
        )
        assert left.is_file()
        assert not (output / "extraction.json").exists()


def test_features_are_pushed_as_a_data_set_in_one_commit(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    with running_hub() as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        output = tmp_path / "out"
        shutil.copytree(extracted, output)
        flags = ["--push_to_hub=true", "--hub_dataset_id=org/feats", "--hub_private=true"]
        words = [sys.executable, *command(encoder, folder, output, *flags)]
        refused = run(words, HF_TOKEN=READER, **online)
        assert refused.returncode != 0
        assert "error: pushing to org/feats needs an access token that may write" in refused.stderr
        done = run(words, HF_TOKEN=WRITER, **online)
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["datasets/org/feats"]
        assert repository.private
        assert len(repository.commits) == 2
        pushed = repository.files()
        data = {f"data/{name}": content for name, content in files(output).items()}
        assert pushed.keys() == data.keys() | {"README.md"}
        assert data.items() <= pushed.items()
        assert str(folder) not in pushed["README.md"].decode()
        for name, content in pushed.items():  # as a download lays it out
            (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "down" / name).write_bytes(content)
        assert set(load(tmp_path / "down", tmp_path)) == {"train", "test"}
