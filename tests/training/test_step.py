"""A step never waits for the device: a GPU is given the next one while it computes.

On the meta device nothing has a value, so whatever asks for one fails: `.item()`, `.tolist()`, a
condition, a copy to the host. Copies from the host that wait are caught one by one.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from workflow import SMALL, WHOLE, assert_same_run, metrics, train

from vicreg_hf.runtime.distributed import Vote
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training import pretrain as pretraining
from vicreg_hf.training import step as stepping
from vicreg_hf.training.building.optimizers import LARS, create_optimizer
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import (
    StepChecks,
    not_finite,
    take_gradients,
    take_step,
    views_from_here,
)

pytestmark = pytest.mark.usefixtures("one_core")
META = torch.device("meta")


class NoTensorsOfNumbers(TorchFunctionMode):
    """Fail where a tensor on the device is made of numbers on the host, which waits."""

    def __torch_function__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            assert result.device != META, f"{func.__name__} waits"
        return result


class NoBlockingCopies(TorchDispatchMode):
    """Fail where a copy to the device is not asked to go on by itself."""

    def __torch_dispatch__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.name() in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if func.name() == "aten::copy_" else args[0]
            goes_on = kwargs.get("non_blocking", False) or True in args[2:]
            if source.device.type == "cpu" and result.device == META and source.numel() > 0:
                assert goes_on, f"{func.name()} of {tuple(source.shape)} waits"
        return result


def flags_of(images: Path, directory: Path, *more: str) -> list[str]:
    return [*SMALL, f"--dataset_name={images}", f"--output_dir={directory}", *more]


def on_meta(images: Path, directory: Path, *more: str) -> Run:
    """A run whose model, optimiser and probe are on the meta device, as on a GPU."""
    run = setup(parse_arguments(flags_of(images, directory, "--max_steps=4", *more)))
    run.model.to(META)  # pyright: ignore[reportArgumentType]
    run.wrapped = run.model
    run.optimizer = create_optimizer(
        run.args.optimizer, run.model, lr=0.1, weight_decay=run.args.weight_decay
    )
    for group in run.optimizer.param_groups:
        if isinstance(run.optimizer, LARS):
            group["foreach"] = True  # as on CUDA
    return run


@pytest.mark.parametrize("more", [
    ["--optimizer=adamw", "--weights=separate"], ["--lars_clip=true", "--expander_dims=8-8"],
], ids=" ".join)  # fmt: skip
def test_a_step_waits_for_nothing(
    more: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it has none for meta
    run = on_meta(images, tmp_path, *more)
    sides = run.views.image_sizes
    views = tuple(torch.randn(16, 3, side, side, device=META) for side in sides)
    with NoBlockingCopies(), NoTensorsOfNumbers():
        step = take_gradients(run, views)
        assert not_finite(run, step).device == META
        take_step(run)
    assert all(p.device == META and p.grad is None for p in run.model.parameters())
    with pytest.raises(RuntimeError):
        step.output.loss.item()  # pyright: ignore


def test_dropout_is_another_in_every_step_and_the_same_when_it_is_taken_again(
    images: Path, tmp_path: Path
) -> None:
    dropping = '--model_args={"drop_rate": 0.3, "drop_path_rate": 0.3}'
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=4", dropping)))
    run.wrapped.train()
    views = next(views_from_here(run))
    losses = []
    for run.step in (0, 0, 1):
        losses.append(take_gradients(run, views).output["loss"].item())
        run.optimizer.zero_grad()
    assert losses[0] == losses[1] != losses[2]


def test_what_waits_is_caught() -> None:
    x = torch.ones(3)
    with NoBlockingCopies(), pytest.raises(AssertionError, match="waits"):
        x.to(META)
    with NoBlockingCopies(), pytest.raises(AssertionError, match="waits"):
        torch.empty(3, device=META).copy_(x)
    with NoTensorsOfNumbers(), pytest.raises(AssertionError, match="waits"):
        torch.tensor([1.0], device=META)
    with pytest.raises(RuntimeError):
        bool(torch.empty((), device=META) > 0)


# Checks that are read one step later


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a check are read one step later, as on a GPU."""
    monkeypatch.setitem(stepping.STEPS_BEHIND, "cpu", 1)


@pytest.mark.usefixtures("later")
def test_a_check_is_read_one_step_later_unless_something_is_kept(
    images: Path, tmp_path: Path
) -> None:
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=4")))
    run.wrapped.train()
    checks = StepChecks(run)
    for views in views_from_here(run):
        step = take_gradients(run, views)
        assert "last_hidden_state" not in step.output  # which is large, and of no use here
        if step.number == 2:
            step.output.loss = step.output.loss * torch.nan  # pyright: ignore
        checks.start(step, stopping=step.number == 1)
        take_step(run)
        if step.number == 1:
            assert checks.collect(include_latest=False) == (None, False, False)
        else:  # asked to stop, so that it is about to be saved
            assert checks.collect(include_latest=False) == (step, True, False)
            break
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


def test_flags_of_tensors_and_of_python_count_alike() -> None:
    flags: list[bool | Tensor] = [True, torch.tensor(True), False, torch.tensor(False)]
    assert Vote(flags, torch.device("cpu")).read() == [True, True, False, False]
