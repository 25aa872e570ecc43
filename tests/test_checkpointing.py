"""Checkpoints: exact, verified, bounded in number, and whole or not there."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.checkpointing import (
    KEEP,
    CheckpointError,
    CheckpointWriter,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    read_state,
    save_checkpoint,
)
from vicreg_hf.optim import create_optimizer

OPTIMISERS = ["lars", "adamw", "sgd"]
Objects = tuple[VICRegModel, Optimizer]


def fresh(optimizer: str = "lars", *, seed: int = 0, width: int = 8) -> Objects:
    """A model with running statistics (test_resnet) and an optimiser without any state."""
    torch.manual_seed(seed)
    config = VICRegConfig(architecture="test_resnet", expander_dims=[width, width])
    model = VICRegModel(config).train()
    return model, create_optimizer(optimizer, model, lr=1e-2, weight_decay=1e-3)


def train(objects: Objects, *, first: int, last: int) -> None:
    model, optimizer = objects
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, 4, 3, 32, 32, generator=generator)
        model(*views).loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def everything(objects: Objects) -> dict[str, Any]:
    """Weights, buffers and optimiser state under flat names."""
    model, optimizer = objects
    state = optimizer.state_dict()
    entries = {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return {**model.state_dict(), **entries}


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, Tensor) else (
            actual[name] == value
        )  # fmt: skip
        assert same, name


@pytest.fixture(scope="module")
def trained() -> Objects:
    objects = fresh()
    train(objects, first=0, last=1)
    return objects


def save_steps(folder: Path, objects: Objects, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, step, *objects, {"of": step}) for step in steps]


# Round trips


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_goes_on_to_the_last_bit(
    name: str, layout: torch.memory_format, tmp_path: Path
) -> None:
    unbroken, resumed = fresh(name), fresh(name, seed=1)
    for model, _ in (unbroken, resumed):
        model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    train(unbroken, first=0, last=1)
    path = save_checkpoint(tmp_path, 1, *unbroken, {})
    load_checkpoint(path, *resumed)
    assert_same_bits(everything(resumed), everything(unbroken))
    for objects in (unbroken, resumed):
        train(objects, first=1, last=3)
    assert_same_bits(everything(resumed), everything(unbroken))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_settings_of_the_optimiser_come_back(name: str, tmp_path: Path) -> None:
    saved, loaded = fresh(name), fresh(name)
    for index, group in enumerate(saved[1].param_groups):
        group["lr"] = 0.1 + index
    load_checkpoint(save_checkpoint(tmp_path, 1, *saved, {}), *loaded)
    expected = json.loads(json.dumps(saved[1].state_dict()["param_groups"]))
    assert json.loads(json.dumps(loaded[1].state_dict()["param_groups"])) == expected


def test_saving_leaves_model_and_optimiser_as_they_were(trained: Objects, tmp_path: Path) -> None:
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in everything(trained).items()}
    save_checkpoint(tmp_path, 1, *trained, {})
    assert_same_bits(everything(trained), before)


def test_step_and_state_come_back(trained: Objects, tmp_path: Path) -> None:
    state = {"settings": {"lr": 1e-4, "name": "ü"}, "scaler": None, "list": [1, 2.5]}
    path = save_checkpoint(tmp_path, 7, *trained, state)
    assert read_state(path) == (7, state)


def test_a_checkpoint_is_named_after_its_step_and_holds_no_pickle(
    trained: Objects, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "made" / "if absent", 7, *trained, {})
    assert path == tmp_path / "made" / "if absent" / "step-7"
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_the_same_step_can_be_saved_again(trained: Objects, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trained, {"time": 1})
    path = save_checkpoint(tmp_path, 1, *trained, {"time": 2})
    assert read_state(path) == (1, {"time": 2})
    assert newest_checkpoint(tmp_path) == (path, [])


def test_the_manifest_says_what_made_it(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, *trained, {"settings": {"seed": 1}}, world_size=3)
    other = save_checkpoint(tmp_path, 8, *trained, {"settings": {"seed": 2}}, world_size=3)
    manifest = read_manifest(path)
    assert manifest["world_size"] == 3
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    digest = hashlib.sha256(b'{"seed": 1}').hexdigest()
    assert manifest["settings_sha256"] == digest != read_manifest(other)["settings_sha256"]


# In the background


def test_what_was_saved_is_of_the_step_and_not_of_later_ones(tmp_path: Path) -> None:
    objects, writer = fresh(), CheckpointWriter(tmp_path)
    expected = {}
    for step in range(3):  # the same memory serves each
        train(objects, first=step, last=step + 1)
        expected = {k: v.clone() if isinstance(v, Tensor) else v
                    for k, v in everything(objects).items()}  # fmt: skip
        writer.save(step, *objects, {})
    train(objects, first=3, last=5)
    writer.wait()
    resumed = fresh(seed=1)
    load_checkpoint(tmp_path / "step-2", *resumed)
    assert_same_bits(everything(resumed), expected)


def test_a_background_save_that_fails_is_told_by_the_next_and_then_forgotten(
    trained: Objects, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("in the way")
    writer = CheckpointWriter(folder)
    writer.save(1, *trained, {})
    while not writer.failed:
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match="checkpoints/step-1"):
        writer.save(2, *trained, {})
    folder.unlink()
    writer.save(3, *trained, {})
    writer.wait()
    assert not writer.failed
    assert newest_checkpoint(folder) == (folder / "step-3", [])


def test_whatever_ends_a_background_save_is_told(trained: Objects, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(1, *trained, {"settings": object()})  # which JSON cannot hold
    with pytest.raises(TypeError, match="JSON"):
        writer.wait()
    assert newest_checkpoint(tmp_path) == (None, [])


def test_a_checkpoint_of_another_model_is_refused(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {})
    with pytest.raises(CheckpointError, match="step-1 does not fit this model"):
        load_checkpoint(path, *fresh(width=16))


def test_a_checkpoint_of_another_optimiser_is_refused(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {})
    with pytest.raises(CheckpointError, match="step-1"):
        load_checkpoint(path, *fresh("adamw"))


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


def test_only_checkpoints_before_a_step_count_where_one_is_given(
    trained: Objects, tmp_path: Path
) -> None:
    before, newest = save_steps(tmp_path, trained, 9, 10)
    assert newest_checkpoint(tmp_path, before=11) == (newest, [])
    assert newest_checkpoint(tmp_path, before=10) == (before, [])
    assert newest_checkpoint(tmp_path, before=9) == (None, [])


def test_where_all_are_damaged_there_is_none(trained: Objects, tmp_path: Path) -> None:
    for path in save_steps(tmp_path, trained, 1, 2):
        delete(path / "model.safetensors")
    path, sentences = newest_checkpoint(tmp_path)
    assert path is None
    assert len(sentences) == 2


@pytest.mark.parametrize("folder", [".", "absent"])
def test_where_nothing_was_saved_there_is_none(folder: str, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / folder) == (None, [])


# How many remain


def test_only_the_newest_remain(trained: Objects, tmp_path: Path) -> None:
    paths = save_steps(tmp_path, trained, 8, 9, 10, 100)
    assert KEEP == 2
    assert sorted(tmp_path.iterdir()) == sorted(paths[-2:])


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


@pytest.mark.parametrize("name", ["step-007", "step-\u00b2", "step-7 "])
def test_names_that_only_look_like_steps_are_left_alone(
    name: str, trained: Objects, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (path,) = save_steps(tmp_path, trained, 8)
    assert newest_checkpoint(tmp_path) == (path, [])
    assert (tmp_path / name).is_dir()


def test_a_manifest_without_end_is_damage(trained: Objects, tmp_path: Path) -> None:
    before, newest = save_steps(tmp_path, trained, 1, 2)
    (newest / "manifest.json").write_text("[" * 200_000)
    assert newest_checkpoint(tmp_path)[0] == before


def test_newest_is_by_number_and_not_by_name(trained: Objects, tmp_path: Path) -> None:
    _, newest = save_steps(tmp_path, trained, 9, 10)
    assert newest_checkpoint(tmp_path) == (newest, [])


def test_a_run_started_over_keeps_what_it_saves(trained: Objects, tmp_path: Path) -> None:
    save_steps(tmp_path, trained, 100, 200)  # of a run before
    path = save_checkpoint(tmp_path, 10, *trained, {})
    assert path.is_dir()


@pytest.mark.parametrize("name", ["step-", "step-9.old", "step-x", ".step-9", "other"])
def test_other_folders_are_left_alone_and_not_taken(
    name: str, trained: Objects, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    paths = save_steps(tmp_path, trained, 1, 2, 3)
    assert newest_checkpoint(tmp_path) == (paths[-1], [])
    assert (tmp_path / name).is_dir()


# Failures


@pytest.mark.parametrize("step", [2, 3])
def test_what_an_interrupted_save_left_is_harmless_and_goes(
    step: int, trained: Objects, tmp_path: Path
) -> None:
    (before,) = save_steps(tmp_path, trained, 1)
    aside = tmp_path / f".step-{step}.partial"
    (aside / "folder").mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (before, [])
    path = save_checkpoint(tmp_path, 2, *trained, {})
    assert newest_checkpoint(tmp_path) == (path, [])
    assert not aside.exists()


FAILING_SAVE = """
import resource, sys
from pathlib import Path
import torch
from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.checkpointing import CheckpointError, newest_checkpoint, save_checkpoint
from vicreg_hf.optim import create_optimizer

folder = Path(sys.argv[1])
model = VICRegModel(VICRegConfig(architecture="test_vit", model_args={"img_size": 32, "depth": 1},
                                 expander_dims=[8, 8]))
optimizer = create_optimizer("adamw", model, lr=0.1, weight_decay=0.1)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
before = save_checkpoint(folder, 1, model, optimizer, {})
sizes = {file.name: file.stat().st_size for file in before.iterdir()}
assert sizes["config.json"] < sizes["model.safetensors"] < sizes["optimizer.safetensors"], sizes
for name in ("config.json", "model.safetensors", "optimizer.safetensors"):
    # files may grow to one byte less than this one needs; root is held to it as well
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 1, resource.RLIM_INFINITY))
    try:
        save_checkpoint(folder, 2, model, optimizer, {})
    except CheckpointError as error:
        message = str(error)
    else:
        message = "no error"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert newest_checkpoint(folder) == (before, []), name
    assert [path.name for path in folder.iterdir()] == ["step-1"], name
    print(f"{name}\\t{message!r}")
after = save_checkpoint(folder, 2, model, optimizer, {})
assert newest_checkpoint(folder) == (after, [])
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_and_names_the_path(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILING_SAVE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    messages = dict(line.split("\t") for line in done.stdout.splitlines())
    assert list(messages) == ["config.json", "model.safetensors", "optimizer.safetensors"]
    for message in messages.values():
        assert f"could not be written to {tmp_path / 'step-2'}" in message


KILLED_SAVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.checkpointing import CheckpointWriter, newest_checkpoint, read_manifest
from vicreg_hf.optim import create_optimizer

torch.set_num_threads(1)  # so that this process can fork
folder, chance = Path(sys.argv[1]), random.Random(0)
model = VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[64, 64]))
optimizer = create_optimizer("lars", model, lr=0.1, weight_decay=0.1)
moments = []
for trial in range(40):
    saved = read_manifest(newest_checkpoint(folder)[0])["step"] if trial else 0
    child = os.fork()
    if not child:
        writer = CheckpointWriter(folder)
        for step in range(saved + 1, saved + 10_000):
            writer.save(step, model, optimizer, {})
    until = time.monotonic() + 30
    while not (newest_checkpoint(folder)[0] or saved):  # at least one
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = sorted(path.name for path in folder.iterdir())
    newest, damaged = newest_checkpoint(folder)
    assert newest is not None and not damaged, (trial, left, damaged)
    assert read_manifest(newest)["step"] >= saved, (trial, left)
    moments.append(any(name.endswith(".partial") for name in left))
print(sum(moments), read_manifest(newest)["step"])
"""


def test_killed_at_forty_moments_of_saving_the_newest_is_always_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    in_the_middle, steps = map(int, done.stdout.split())
    assert in_the_middle >= 10
    assert steps > 40


def test_a_folder_that_cannot_be_made_is_named(trained: Objects, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints/step-1"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, *trained, {})


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
