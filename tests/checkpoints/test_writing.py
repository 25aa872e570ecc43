"""Checkpoints: exact, bounded in number, and found by their steps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from checkpoints import (
    Objects,
    after_a_step,
    assert_same_bits,
    everything,
    fresh,
    save_steps,
    train,
)
from torch import Tensor

from vicreg_hf.checkpoints.reading import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    read_manifest,
    read_state,
)
from vicreg_hf.checkpoints.writing import KEEP, CheckpointWriter, save_checkpoint

OPTIMISERS = ["lars", "adamw", "sgd"]


@pytest.fixture(scope="module")
def trained() -> Objects:
    return after_a_step()


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


def test_a_checkpoint_of_another_model_is_refused(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {})
    with pytest.raises(CheckpointError, match="step-1 does not fit this model"):
        load_checkpoint(path, *fresh(width=16))


def test_a_checkpoint_of_another_optimiser_is_refused(trained: Objects, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *trained, {})
    with pytest.raises(CheckpointError, match="step-1"):
        load_checkpoint(path, *fresh("adamw"))


# Which is taken


def test_newest_is_by_number_and_not_by_name(trained: Objects, tmp_path: Path) -> None:
    _, newest = save_steps(tmp_path, trained, 9, 10)
    assert newest_checkpoint(tmp_path) == (newest, [])


def test_only_checkpoints_before_a_step_count_where_one_is_given(
    trained: Objects, tmp_path: Path
) -> None:
    before, newest = save_steps(tmp_path, trained, 9, 10)
    assert newest_checkpoint(tmp_path, before=11) == (newest, [])
    assert newest_checkpoint(tmp_path, before=10) == (before, [])
    assert newest_checkpoint(tmp_path, before=9) == (None, [])


@pytest.mark.parametrize("folder", [".", "absent"])
def test_where_nothing_was_saved_there_is_none(folder: str, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / folder) == (None, [])


@pytest.mark.parametrize("name", ["step-007", "step-\u00b2", "step-7 "])
def test_names_that_only_look_like_steps_are_left_alone(
    name: str, trained: Objects, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (path,) = save_steps(tmp_path, trained, 8)
    assert newest_checkpoint(tmp_path) == (path, [])
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("name", ["step-", "step-9.old", "step-x", ".step-9", "other"])
def test_other_folders_are_left_alone_and_not_taken(
    name: str, trained: Objects, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    paths = save_steps(tmp_path, trained, 1, 2, 3)
    assert newest_checkpoint(tmp_path) == (paths[-1], [])
    assert (tmp_path / name).is_dir()


# How many remain


def test_only_the_newest_remain(trained: Objects, tmp_path: Path) -> None:
    paths = save_steps(tmp_path, trained, 8, 9, 10, 100)
    assert KEEP == 2
    assert sorted(tmp_path.iterdir()) == sorted(paths[-2:])


def test_a_run_started_over_keeps_what_it_saves(trained: Objects, tmp_path: Path) -> None:
    save_steps(tmp_path, trained, 100, 200)  # of a run before
    path = save_checkpoint(tmp_path, 10, *trained, {})
    assert path.is_dir()
