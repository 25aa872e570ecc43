"""Checkpoints are exact, bounded in number, and each is whole or not there."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from checkpoints import PROBE_STATE, assert_same_bits, everything, fresh, save, train, trained
from torch import Tensor
from warm import Script
from workflow import small_files

from vicreg_hf.checkpoints.reading import (
    FILES,
    MANIFEST,
    PROBE,
    CheckpointError,
    load_checkpoint,
    load_probe,
    newest_checkpoint,
    read_manifest,
)
from vicreg_hf.checkpoints.writing import KEEP, CheckpointWriter

# Round trips


@pytest.mark.parametrize(
    "name", ["lars", "adamw", "adam", "sgd", "momentum", "radam", "nadam", "lamb"]
)
def test_training_goes_on_to_the_last_bit(name: str, tmp_path: Path) -> None:
    unbroken, resumed = fresh(name), fresh(name, seed=1)
    for model, optimizer in (unbroken, resumed):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 + index * (model is unbroken[0])  # each group's own comes back
    train(unbroken, first=0, last=1)
    path = save(tmp_path, 1, unbroken)
    load_checkpoint(path, *resumed)
    for first in (1, 2):
        assert_same_bits(everything(resumed), everything(unbroken))
        groups = [json.dumps(objects[1].state_dict()["param_groups"], default=float)
                  for objects in (resumed, unbroken)]  # fmt: skip
        assert groups[0] == groups[1]
        for objects in (unbroken, resumed):
            train(objects, first=first, last=first + 1)


def test_a_checkpoint_holds_what_its_manifest_says(tmp_path: Path) -> None:
    state = {"settings": {"lr": 1e-4, "name": "ü"}, "scaler": None, "total_steps": 9}
    writer = CheckpointWriter(tmp_path / "made" / "if absent", world_size=3)
    writer.save(7, *trained(), state, probe=PROBE_STATE)
    writer.wait()
    path = tmp_path / "made" / "if absent" / "step-7"
    manifest = read_manifest(path)
    assert {file.name for file in path.iterdir()} == {*FILES, PROBE, MANIFEST}
    assert_same_bits(load_probe(path) or {}, PROBE_STATE)
    assert (manifest["step"], manifest["state"], manifest["world_size"]) == (7, state, 3)
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    settings = json.dumps(state["settings"], sort_keys=True).encode()
    assert manifest["settings_sha256"] == hashlib.sha256(settings).hexdigest()


def test_what_was_saved_is_of_the_step_and_not_of_later_ones(tmp_path: Path) -> None:
    objects, writer = fresh(), CheckpointWriter(tmp_path)
    expected = {}
    for step in range(3):  # the same memory serves each
        train(objects, first=step, last=step + 1)
        expected = {k: v.clone() if isinstance(v, Tensor) else v
                    for k, v in everything(objects).items()}  # fmt: skip
        writer.save(step, *objects, {})
    assert_same_bits(everything(objects), expected)
    train(objects, first=3, last=5)
    writer.wait()
    resumed = fresh(seed=1)
    load_checkpoint(tmp_path / "step-2", *resumed)
    assert_same_bits(everything(resumed), expected)


# How many remain


def test_the_newest_that_are_whole_remain_and_everything_else_is_left_alone(tmp_path: Path) -> None:
    others = ["step-007", "step-\u00b2", "step-7 ", "step-", "step-9.old", ".step-9", "other"]
    for name in others:
        (tmp_path / name).mkdir()
    _, whole, damaged, newest = (save(tmp_path, step) for step in (8, 9, 10, 100))
    assert KEEP == 2
    assert not whole.exists()
    (tmp_path / "step-50").mkdir()
    (damaged / "optimizer.safetensors").unlink()
    last = save(tmp_path, 101)
    assert {path.name for path in tmp_path.iterdir()} == {*others, newest.name, last.name}
    restarted = save(tmp_path, 1)  # later ones are of a run before
    assert {path.name for path in tmp_path.iterdir()} == {*others, restarted.name}
    assert newest_checkpoint(tmp_path) == (restarted, [])
    save(tmp_path, 1, seconds=2.0)
    assert read_manifest(restarted)["state"] == {"seconds": 2.0}


def test_milestones_and_the_best_that_the_newest_name_remain_too(tmp_path: Path) -> None:
    def save_step(step: int, best: int) -> set[str]:
        save(tmp_path, step, milestone=step % 4 == 0, best={"step": best})
        return {path.name for path in tmp_path.iterdir()}

    for step in (1, 2, 3, 4):
        save_step(step, 1)
    assert save_step(5, 1) == {"step-1", "step-4", "step-5"}
    # where step 6 is lost, the run goes on from step 5 and still needs step 1
    assert save_step(6, 6) == {"step-1", "step-4", "step-5", "step-6"}
    assert save_step(7, 6) == {"step-4", "step-6", "step-7"}
    save_step(8, 6)
    assert save_step(9, 6) == {f"step-{step}" for step in (4, 6, 8, 9)}
    (tmp_path / "step-9" / MANIFEST).write_text("damaged")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-8"
    assert save_step(5, 4) == {"step-4", "step-5"}  # later ones are of a run before


# Failures


def test_a_save_that_fails_is_told_by_the_next_and_then_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("in the way")
    writer = CheckpointWriter(folder)
    writer.save(1, *trained(), {})
    while not writer.failed:
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match="checkpoints/step-1"):
        writer.save(2, *trained(), {})
    folder.unlink()
    writer.save(3, *trained(), {"settings": {"a": object()}})  # which JSON cannot hold
    with pytest.raises(TypeError, match="JSON"):
        writer.wait()
    writer.save(4, *trained(), {})
    writer.wait()
    assert not writer.failed
    assert newest_checkpoint(folder) == (folder / "step-4", [])


@pytest.mark.parametrize("step", [2, 3])
def test_what_an_interrupted_save_left_is_harmless_and_goes(step: int, tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    aside = tmp_path / f".step-{step}.partial"
    (aside / "folder").mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (before, [])
    path = save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == (path, [])
    assert not aside.exists()


def test_a_step_that_is_saved_once_more_is_there_when_the_first_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, remove, removed = save(tmp_path, 1), shutil.rmtree, []

    def remove_and_look(folder: Path) -> None:
        remove(folder)
        removed.append(newest_checkpoint(tmp_path))

    monkeypatch.setattr(shutil, "rmtree", remove_and_look)
    assert save(tmp_path, 1) == path
    assert removed == [(path, [])]
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_that_cannot_be_saved_once_more_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = save(tmp_path, 1), Path.rename

    def fail_for_new_ones(source: Path, target: Path) -> Path:
        if source.name == ".step-1.partial":
            raise OSError("no room for a name")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_for_new_ones)
    with pytest.raises(CheckpointError, match=r"no room for a name. Earlier checkpoints are"):
        save(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == (path, [])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_names_the_path(
    name: str, tmp_path: Path
) -> None:
    objects = fresh("adamw", width=128)
    train(objects, first=0, last=1)
    before = save(tmp_path, 1, objects)
    sizes = {file.name: file.stat().st_size for file in before.iterdir()}
    assert sizes["config.json"] < sizes["model.safetensors"] < sizes["optimizer.safetensors"]
    message = f"could not be written to {tmp_path / 'step-2'}: .* Earlier checkpoints are"
    with small_files(sizes[name] - 1), pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2, objects)
    assert newest_checkpoint(tmp_path) == (before, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


SAVING = """
import sys
from pathlib import Path
from checkpoints import fresh
from vicreg_hf.checkpoints.writing import CheckpointWriter

objects, writer = fresh(width=64), CheckpointWriter(Path(sys.argv[1]))
for step in range(int(sys.argv[2]), int(sys.argv[2]) + 10_000):
    writer.save(step, *objects, {})
"""


def test_killed_at_twenty_moments_of_saving_the_newest_is_always_whole(tmp_path: Path) -> None:
    script, folder, chance = tmp_path / "saving.py", tmp_path / "saved", random.Random(0)
    script.write_text(SAVING)
    in_the_middle = 0
    newest = save(folder, 1, fresh(width=64))
    for trial in range(20):
        saved = int(newest.name.removeprefix("step-"))
        saving = Script([str(script), str(folder), str(saved + 1)])
        until = time.monotonic() + 30
        least = saved + 1 - trial % 2  # every second time it gets on
        while not any((folder / f"step-{step}").exists() for step in (least, least + 1)):
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.06))
        saving.kill()
        saving.communicate()
        left = sorted(path.name for path in folder.iterdir())
        found, damaged = newest_checkpoint(folder)
        assert found is not None, (trial, left)
        assert not damaged, (trial, left, damaged)
        assert int(found.name.removeprefix("step-")) >= saved, (trial, left)
        newest = found
        in_the_middle += any(name.endswith(".partial") for name in left)
    assert in_the_middle >= 4
    assert int(newest.name.removeprefix("step-")) >= 10
