"""Extractions as users start them: on several processes, killed, refused and pushed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from extracting import SETTINGS, extract, files, load, write_encoder, write_folder
from hub import READER, WRITER, connected, running_hub
from warm import Script, run_script, wait_for

from vicreg_hf.hub.api import HubError
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
        wait_for(process, lambda n=parts: len(list(output.glob("data/t*.parquet"))) >= n)
        process.kill()
        process.communicate()
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert files(extracted).items() <= files(output).items()


def test_a_directory_in_use_is_refused(encoder: Path, folder: Path, tmp_path: Path) -> None:
    with (
        claim(tmp_path),
        pytest.raises(ValueError, match=rf"output_dir must not be in use .*, and {tmp_path} is"),
    ):
        extract(encoder, folder, tmp_path)
    assert not (tmp_path / "extraction.json").exists()


def test_features_are_pushed_as_a_data_set_in_one_commit(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(extracted, tmp_path / "out")
    pushed = {"push_to_hub": True, "hub_dataset_id": "org/feats", "hub_private": True,
              "publish_names": True}  # fmt: skip
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        monkeypatch.setenv("HF_TOKEN", READER)
        with pytest.raises(HubError, match="pushing to org/feats needs an access token that may"):
            extract(encoder, folder, output, **pushed)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        extract(encoder, folder, output, **pushed)
    repository = hub.repositories["datasets/org/feats"]
    assert repository.private
    assert len(repository.commits) == 2  # the first is empty
    found = repository.files()
    data = {f"data/{name}": content for name, content in files(output).items()}
    assert found.keys() == data.keys() | {"README.md"}
    assert data.items() <= found.items()
    assert str(folder) not in found["README.md"].decode()
    (output / "README.md").write_bytes(found["README.md"])  # as a download lays it out
    assert set(load(output, tmp_path)) == {"train", "test"}
