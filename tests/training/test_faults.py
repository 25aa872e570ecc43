"""Runs without room, memory or finite numbers."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workflow import SMALL, WHOLE, assert_same_run, metrics, small_files, train

from vicreg_hf.checkpoints.reading import CheckpointError, newest_checkpoint
from vicreg_hf.runtime.signals import Signals
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training import pretrain as pretraining
from vicreg_hf.training.faults import OutOfMemory, explained
from vicreg_hf.training.replay import replay
from vicreg_hf.training.resuming import save
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core")


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    images: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = pretraining.fit

    def fit_without_room(run: Run, signals: Signals) -> None:
        with small_files(500_000):  # bytes, a third of a checkpoint's weights
            fit(run, signals)

    monkeypatch.setattr(pretraining, "fit", fit_without_room)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        train(images, tmp_path, *WHOLE)
    monkeypatch.undo()
    train(images, tmp_path, *WHOLE)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cub`"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), torch.AcceleratorError),
    ],
    ids=["memory", "pinned memory", "a library's workspace", "another fault"],
)
def test_want_of_memory_on_a_gpu_is_told_with_what_helps(
    error: RuntimeError, told: type[RuntimeError]
) -> None:
    """As torch 2.11 raises it."""
    words = "lower --micro_batch_size" if told is OutOfMemory else "illegal"
    with pytest.raises(told, match=words), explained(parse_arguments([])):
        raise error


def test_want_of_memory_for_the_model_is_told_before_training(images: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"before the first step.*narrow --expander_dims, now"):
        train(images, tmp_path, "--expander_dims=2000000-2000000")


def test_a_step_that_is_not_finite_is_not_taken_and_can_be_replayed(
    images: Path, tmp_path: Path
) -> None:
    flags = ["--optimizer=sgd", "--base_lr=1e30", "--max_steps=40", "--save_steps=1"]
    with pytest.raises(FloatingPointError) as caught:
        train(images, tmp_path, *flags)
    (report,) = tmp_path.glob("not-finite-step-*.json")
    found = json.loads(report.read_text())
    step = found["step"]
    for words in (f"loss and gradients must be finite at step {step}, got loss",
                  "lower --base_lr, now 1e+30", str(report), found["replay"]):  # fmt: skip
        assert words in str(caught.value)
    assert len(found["rows"]) == 16
    assert found["gradients"] or not torch.isfinite(torch.tensor(float(found["loss"])))
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{step - 1}" == found["checkpoint"]
    assert not damaged
    for value in load_file(newest / "model.safetensors").values():
        assert torch.isfinite(value.float()).all()
    *_, output_dir, _, number = shlex.split(found["replay"])
    again = replay(parse_arguments([f"--config={output_dir}/config.yaml"]), int(number))
    replayed = json.loads(again.read_text())
    assert replayed == {key: found[key] for key in replayed}


def test_weights_that_are_not_finite_are_not_saved(images: Path, tmp_path: Path) -> None:
    own = [f"--dataset_name={images}", f"--output_dir={tmp_path}", "--max_steps=2"]
    run = setup(parse_arguments([*SMALL, *own]))
    with torch.no_grad():
        next(run.model.parameters())[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="optimiser state must be finite after step 0"):
        save(run)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    (report,) = tmp_path.glob("not-finite-step-0.json")
    assert len(json.loads(report.read_text())["weights"]) == 1


def test_any_step_can_be_replayed(whole_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    before = metrics(run)
    args = parse_arguments([f"--config={run / 'config.yaml'}", f"--output_dir={run}"])
    found = json.loads(replay(args, 8).read_text())
    for name in ("loss", "invariance", "variance", "covariance", "grad_norm", "lr"):
        assert found[name] == before[-1][name]
    assert metrics(run) == before
    assert not any(entry for entry in (found["gradients"], found["weights"]))
