"""Callbacks of one's own see a run, end it, and change nothing of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from workflow import flags_of, metrics, write_images

from vicreg_hf import Callback, pretrain
from vicreg_hf.settings.command_line import parse_arguments

STEPS = ["--max_steps=6", "--save_steps=4", "--seed=3"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("undisturbed")
    pretrain(parse_arguments(flags_of(images, output_dir, *STEPS)))
    return output_dir


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
    images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    args = parse_arguments(flags_of(images, tmp_path, *STEPS))
    failing, seeing = Disturbing(fails_at=3), Disturbing()
    with pytest.raises(KeyError, match="my own fault"):
        pretrain(args, callbacks=[failing])
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-3"]
    pretrain(args, callbacks=[seeing])
    assert failing.told == [1, 2, 3]
    assert seeing.told == [4, ("step-4", True), 5, 6, ("step-6", True), True]
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path).items())
    assert [row.get("loss") for row in metrics(tmp_path)] == [
        row.get("loss") for row in metrics(undisturbed)
    ]


def test_a_run_that_a_callback_ends_is_done_and_stays_so_until_it_is_given_more_steps(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(images, tmp_path, *STEPS)
    ending = Disturbing(ends_at=3)
    pretrain(parse_arguments(flags), callbacks=[ending])
    assert ending.told == [1, 2, 3, ("step-3", True), True]
    card = (tmp_path / "encoder/README.md").read_text()
    assert "| steps | 3 of 16 images" in card
    assert metrics(tmp_path)[-1]["knn"] >= 0  # as at the end of every run
    before = weights(tmp_path)
    pretrain(parse_arguments(flags))
    assert "The run was ended after step 3: all is seen." in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    pretrain(parse_arguments([*flags, "--max_steps=7"]))
    assert metrics(tmp_path)[-1]["step"] == 7


@pytest.mark.parametrize("callbacks", [[Disturbing], [print], Disturbing])
def test_what_is_no_callback_is_refused(callbacks: Any, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^callbacks must be a list of instances of vicreg_hf"):
        pretrain(parse_arguments(flags_of(images, tmp_path)), callbacks=callbacks)
