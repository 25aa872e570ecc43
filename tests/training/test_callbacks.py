"""Callbacks of one's own see a run, end it, and change nothing of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from workflow import WHOLE, assert_same_run, flags_of, metrics, train

from vicreg_hf import Callback, pretrain
from vicreg_hf.settings.command_line import parse_arguments

pytestmark = pytest.mark.usefixtures("one_core")


class Disturbing(Callback):
    """Notes what it is told, and tries to change the run."""

    def __init__(self, *, fails_at: int = 0, ends_at: int = 0) -> None:
        self.told: list[Any] = []
        self.fails_at, self.ends_at = fails_at, ends_at

    def on_step(self, run: Any, step: Any) -> None:
        self.told.append(run.step)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        run.model.eval()
        run.model.expander[0].weight.square().sum().backward()
        if step.number == self.fails_at:
            raise KeyError("my own fault")

    def on_log(self, run: Any, row: dict[str, Any]) -> None:
        row.clear()
        if run.step == self.ends_at:
            run.request_stop("all is seen")

    def on_save(self, run: Any, checkpoint: Path) -> None:  # noqa: ARG002
        self.told.append((checkpoint.name, (checkpoint / "manifest.json").is_file()))

    def on_end(self, run: Any, encoder: Path) -> None:  # noqa: ARG002
        self.told.append((encoder / "README.md").is_file())


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "encoder/model.safetensors")


def test_a_callback_that_fails_leaves_a_run_that_goes_on_as_if_undisturbed(
    images: Path, whole_run: Path, tmp_path: Path
) -> None:
    failing, seeing = Disturbing(fails_at=4), Disturbing()
    with pytest.raises(KeyError, match="my own fault"):
        train(images, tmp_path, *WHOLE, callbacks=[failing])
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} == {"step-3", "step-4"}
    train(images, tmp_path, *WHOLE, callbacks=[seeing])
    assert failing.told == [1, 2, 3, ("step-3", True), 4]
    assert seeing.told == [5, 6, ("step-6", True), 7, 8, ("step-8", True), True]
    assert_same_run(tmp_path, whole_run)
    expected = weights(whole_run)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())


def test_a_run_that_a_callback_ends_is_done_and_stays_so_until_it_is_given_more_steps(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = Disturbing(ends_at=2)
    train(images, tmp_path, "--max_steps=3", callbacks=[ending])
    assert ending.told == [1, 2, ("step-2", True), True]
    card = (tmp_path / "encoder/README.md").read_text()
    assert "| steps | 2 of 16 images" in card
    assert metrics(tmp_path)[-1]["knn"] >= 0  # as at the end of every run
    before = weights(tmp_path)
    train(images, tmp_path, "--max_steps=3")
    assert "The run was ended after step 2: all is seen." in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    assert train(images, tmp_path, "--max_steps=4")[-1]["step"] == 4


@pytest.mark.parametrize("callbacks", [[Disturbing], [print], Disturbing])
def test_what_is_no_callback_is_refused(callbacks: Any, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^callbacks must be a list of instances of vicreg_hf"):
        pretrain(parse_arguments(flags_of(images, tmp_path)), callbacks=callbacks)
