"""Checkpoints that are damaged, of another model, or that someone has put a pickle into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Objects, fresh, save
from hostile import plant
from safetensors import SafetensorError

from vicreg_hf.checkpoints.reading import (
    FILES,
    MANIFEST,
    PROBE,
    CheckpointError,
    load_checkpoint,
    load_probe,
    newest_checkpoint,
)


def test_the_newest_is_by_number_and_may_be_of_before_a_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") == newest_checkpoint(tmp_path) == (None, [])
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest_checkpoint(tmp_path, before=11) == (newest, [])
    assert newest_checkpoint(tmp_path, before=10) == (before, [])
    assert newest_checkpoint(tmp_path, before=9) == (None, [])


# Damage


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "a bit flipped": flip_a_bit,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("name", sorted({*FILES, PROBE, MANIFEST}))
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: Callable[[Path], Any], name: str, tmp_path: Path
) -> None:
    before, newest = save(tmp_path, 9), save(tmp_path, 10)
    damage(newest / name)
    path, (sentence,) = newest_checkpoint(tmp_path)
    assert path == before
    assert f"checkpoint {newest} is damaged (" in sentence
    assert name == MANIFEST or name in sentence


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"step": 16', '"step": 17'),
        lambda text: text.replace('"seed": 8', '"seed": 9'),
        lambda text: json.dumps(json.loads(text) | {"files": {}}),
        lambda text: "[" * 200_000,  # noqa: ARG005
    ],
)
def test_a_changed_manifest_is_damage(change: Callable[[str], str], tmp_path: Path) -> None:
    manifest = save(tmp_path, 16, settings={"seed": 8}) / MANIFEST
    text = manifest.read_text()
    assert change(text) != text
    manifest.write_text(change(text))
    path, sentences = newest_checkpoint(tmp_path)
    assert path is None
    assert len(sentences) == 1


@pytest.mark.parametrize(
    "obstacle",
    [
        lambda path: path.write_text("hi"),
        lambda path: path.symlink_to(path.with_name("nowhere")),
        lambda path: path.symlink_to(path.parent, target_is_directory=True),
    ],
)
def test_what_is_no_checkpoint_gives_way_to_one(
    obstacle: Callable[[Path], None], tmp_path: Path
) -> None:
    before = save(tmp_path, 1)
    obstacle(tmp_path / "step-2")
    newest, damaged = newest_checkpoint(tmp_path)
    assert newest == before
    assert len(damaged) == 1
    path = save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == (path, [])


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights)  # opened, it is no missing file but an error of the system
    with pytest.raises(CheckpointError, match=r"step-2 cannot be read .*; start again when it can"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("other", [fresh(width=16), fresh("adamw")], ids=["model", "optimiser"])
def test_a_checkpoint_of_another_model_or_optimiser_is_refused(
    other: Objects, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="step-1 does not fit this model and optimiser: "):
        load_checkpoint(save(tmp_path, 1), *other)


# Malice


@pytest.mark.parametrize("as_torch_file", [True, False])
@pytest.mark.parametrize("name", sorted({*FILES, PROBE}))
def test_a_pickle_in_place_of_a_file_is_never_run(
    name: str, as_torch_file: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path, 1)
    plant(path / name, marker, as_torch_file=as_torch_file)
    content = (path / name).read_bytes()
    manifest = json.loads((path / MANIFEST).read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"size": len(content), "sha256": digest}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2))  # the attacker's as well

    def load() -> None:
        load_checkpoint(path, *fresh())
        load_probe(path)

    if name == "config.json":  # which is for AutoModel; resuming does not read it
        load()
    else:
        with pytest.raises((CheckpointError, SafetensorError, ValueError)):
            load()
    assert not marker.exists()
