"""One step of training, and its check, which a GPU reads one step later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workflow import SMALL, WHOLE, assert_same_run, metrics, train

from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training import pretrain as pretraining
from vicreg_hf.training import step as stepping
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import StepChecks, take_gradients, take_step, views_from_here

pytestmark = pytest.mark.usefixtures("one_core")


def begun(images: Path, directory: Path, *more: str) -> Run:
    own = [f"--dataset_name={images}", f"--output_dir={directory}", "--max_steps=4"]
    run = setup(parse_arguments([*SMALL, *own, *more]))
    run.wrapped.train()
    return run


def test_dropout_is_another_in_every_step_and_the_same_when_it_is_taken_again(
    images: Path, tmp_path: Path
) -> None:
    run = begun(images, tmp_path, '--model_args={"drop_rate": 0.3, "drop_path_rate": 0.3}')
    views = next(views_from_here(run))
    losses = []
    for run.step in (0, 0, 1):
        losses.append(take_gradients(run, views).output["loss"].item())
        run.optimizer.zero_grad()
    assert losses[0] == losses[1] != losses[2]


# Checks that are read one step later


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a check are read one step later, as on a GPU."""
    monkeypatch.setitem(stepping.STEPS_BEHIND, "cpu", 1)


@pytest.mark.usefixtures("later")
def test_a_check_is_read_one_step_later_unless_something_is_kept(
    images: Path, tmp_path: Path
) -> None:
    run = begun(images, tmp_path)
    checks = StepChecks(run)
    first, second, *_ = views_from_here(run)
    step = take_gradients(run, first)
    assert "last_hidden_state" not in step.output  # which is large, and of no use here
    checks.start(step, stopping=True)
    take_step(run)
    assert checks.collect(include_latest=False) == (None, False, False)
    step = take_gradients(run, second)
    step.output.loss = step.output.loss * torch.nan  # pyright: ignore
    checks.start(step)
    # asked to stop, so that it is about to be saved
    assert checks.collect(include_latest=False) == (step, True, False)
    checks.start(step)
    assert checks.collect(include_latest=False).bad_step is None
    assert checks.collect(include_latest=True).bad_step is step


@pytest.mark.usefixtures("later")
def test_a_run_is_the_same_where_checks_are_read_later(
    images: Path, whole_run: Path, tmp_path: Path
) -> None:
    train(images, tmp_path, *WHOLE)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("every", [1, 3, 50])
def test_a_step_that_is_not_finite_is_neither_logged_nor_saved(
    every: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, learn = 4, pretraining.take_gradients

    def spoil(run: Run, views: tuple[Any, ...]) -> stepping.Step:
        step = learn(run, views)
        if step.number == bad:
            for p in run.model.parameters():
                p.grad = torch.full_like(p, torch.nan)
            step.grad_norm = torch.tensor(torch.nan)
        return step

    monkeypatch.setattr(pretraining, "take_gradients", spoil)
    steps = [f"--save_steps={every}", f"--logging_steps={every}", "--max_steps=9"]
    with pytest.raises(FloatingPointError, match=f"must be finite at step {bad}, got"):
        train(images, tmp_path, *steps)
    kept = [step for step in range(1, bad) if step % every == 0]
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == kept
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == [f"step-{step}" for step in kept][-2:]
    found = json.loads((tmp_path / f"not-finite-step-{bad}.json").read_text())
    assert len(found["rows"]) == 16
    assert (found["weights"] is None) == (bad % every != 0)  # as it had been taken
