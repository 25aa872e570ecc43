"""Checkpoints that are damaged, or that someone has put a pickle into."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Objects, after_a_step, fresh, save_steps
from safetensors import SafetensorError

from vicreg_hf.checkpoints.reading import CheckpointError, load_checkpoint, newest_checkpoint
from vicreg_hf.checkpoints.writing import CheckpointWriter, save_checkpoint


@pytest.fixture(scope="module")
def trained() -> Objects:
    return after_a_step()


# Damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete(file: Path) -> None:
    file.unlink()


FILES = [
    "config.json", "manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors",
]  # fmt: skip


def test_every_file_of_a_checkpoint_is_tried_below(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {})
    assert sorted(file.name for file in path.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, delete])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: Callable[[Path], None], name: str, trained: Objects, tmp_path: Path
) -> None:
    before, newest = save_steps(tmp_path, trained, 9, 10)
    damage(newest / name)
    path, sentences = newest_checkpoint(tmp_path)
    assert path == before
    assert len(sentences) == 1
    assert str(newest) in sentences[0]


@pytest.mark.parametrize(("old", "new"), [('"step": 16', '"step": 17'), ('"seed": 8', '"seed": 9')])
def test_a_manifest_with_one_bit_flipped_is_damage(
    old: str, new: str, trained: Objects, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, 16, *trained, {"settings": {"seed": 8}})
    manifest = path / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))
    assert newest_checkpoint(tmp_path)[0] is None


def test_a_manifest_that_lists_no_files_is_damage(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    assert newest_checkpoint(tmp_path)[0] is None


def test_a_manifest_without_end_is_damage(trained: Objects, tmp_path: Path) -> None:
    before, newest = save_steps(tmp_path, trained, 1, 2)
    (newest / "manifest.json").write_text("[" * 200_000)
    assert newest_checkpoint(tmp_path)[0] == before


def test_where_all_are_damaged_there_is_none(trained: Objects, tmp_path: Path) -> None:
    for path in save_steps(tmp_path, trained, 1, 2):
        delete(path / "model.safetensors")
    path, sentences = newest_checkpoint(tmp_path)
    assert path is None
    assert len(sentences) == 2


@pytest.mark.parametrize("in_the_background", [True, False])
@pytest.mark.parametrize("damage", [flip_a_bit, delete, empty])
def test_damaged_ones_do_not_count_towards_those_that_remain(
    damage: Callable[[Path], None], in_the_background: bool, trained: Objects, tmp_path: Path
) -> None:
    whole, damaged = save_steps(tmp_path, trained, 10, 20)
    (tmp_path / "step-25").mkdir()
    damage(damaged / "optimizer.safetensors")
    if in_the_background:
        writer = CheckpointWriter(tmp_path)
        writer.save(30, *trained, {})
        writer.wait()
    else:
        save_steps(tmp_path, trained, 30)
    assert sorted(tmp_path.iterdir()) == [whole, tmp_path / "step-30"]


def in_the_way_file(path: Path) -> None:
    path.write_text("hi")


def in_the_way_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"), target_is_directory=True)
    path.with_name("elsewhere").mkdir()


def in_the_way_dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("obstacle", [in_the_way_file, in_the_way_link, in_the_way_dangling])
def test_what_is_no_checkpoint_gives_way_to_one(
    obstacle: Callable[[Path], None], trained: Objects, tmp_path: Path
) -> None:
    (before,) = save_steps(tmp_path, trained, 1)
    obstacle(tmp_path / "step-2")
    newest, damaged = newest_checkpoint(tmp_path)
    assert newest == before
    assert len(damaged) == 1
    (path,) = save_steps(tmp_path, trained, 2)
    assert newest_checkpoint(tmp_path) == (path, [])


# Malice


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("as_torch_file", [True, False])
@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_pickle_in_place_of_a_file_is_never_run(
    name: str, as_torch_file: bool, trained: Objects, tmp_path: Path
) -> None:
    path, marker = save_checkpoint(tmp_path, 1, *trained, {}), tmp_path / "marker"
    if as_torch_file:
        torch.save(Bomb(marker), path / name)
    else:
        (path / name).write_bytes(pickle.dumps(Bomb(marker)))
    content = (path / name).read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"size": len(content), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2))  # the attacker's as well
    if name != "config.json":  # which is for AutoModel; resuming does not read it
        with pytest.raises((CheckpointError, SafetensorError, ValueError)):
            load_checkpoint(path, *fresh())
    else:
        load_checkpoint(path, *fresh())
    assert not marker.exists()
