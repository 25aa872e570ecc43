"""Saves that fail or are killed: a checkpoint is whole or not there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import Objects, after_a_step, save_steps

from vicreg_hf.checkpoints.reading import CheckpointError, newest_checkpoint
from vicreg_hf.checkpoints.writing import CheckpointWriter, save_checkpoint


@pytest.fixture(scope="module")
def trained() -> Objects:
    return after_a_step()


# In the background


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
from vicreg_hf.checkpoints.reading import CheckpointError, newest_checkpoint
from vicreg_hf.checkpoints.writing import save_checkpoint
from vicreg_hf.training.building.optimizers import create_optimizer

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
from vicreg_hf.checkpoints.reading import newest_checkpoint, read_manifest
from vicreg_hf.checkpoints.writing import CheckpointWriter
from vicreg_hf.training.building.optimizers import create_optimizer

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
    least = saved + 1 if trial % 2 == 0 else saved  # every second time it gets on
    while (newest := newest_checkpoint(folder)[0]) is None or read_manifest(newest)["step"] < least:
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
    assert steps >= 20


def test_a_folder_that_cannot_be_made_is_named(trained: Objects, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints/step-1"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, *trained, {})
