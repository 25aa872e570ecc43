"""A step never waits for the device: a GPU is given the next one while it computes.

On the meta device nothing has a value, so whatever asks for one fails: `.item()`, `.tolist()`, a
condition, a copy to the host. Copies from the host that wait are caught one by one.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from warm import ranks, run_script
from workflow import SMALL, metrics, write_images

from vicreg_hf import TwoViews, pretrain
from vicreg_hf.runtime.distributed import Vote
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training import pretrain as pretraining
from vicreg_hf.training import step as verdicts
from vicreg_hf.training.building.optimizers import LARS, create_optimizer
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import Verdicts, not_finite, take_gradients, take_step, views_from_here
from vicreg_hf.views.presets import PRESETS
from vicreg_hf.views.random_views import RandomViews

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
    """Fail where a copy to the device is not asked to go on by itself, and count those that are."""

    count = 0

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
                self.count += 1
        return result


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=32)


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
    ["--optimizer=lars"], ["--optimizer=adamw"], ["--optimizer=lars", "--lars_clip=true"],
    ["--optimizer=lars", "--expander_dims=8-8"], ["--weights=separate"], ["--num_local_views=2"],
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


def test_views_wait_for_nothing() -> None:
    images = torch.zeros(8, 3, 40, 40, dtype=torch.uint8, device=META)
    with NoBlockingCopies(), NoTensorsOfNumbers():
        views = TwoViews(32, "authors")(images, np.arange(8))
    for view in views:
        assert view.device == META
        assert view.shape == (8, 3, 32, 32)


@pytest.mark.parametrize(("sides", "copies"), [([8] * 2, 3), ([8] * 2 + [4] * 3, 5)])
def test_what_decides_views_goes_to_the_device_in_few_copies(sides: list[int], copies: int) -> None:
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8, device=META)
    recipes = (PRESETS["paper"].x,) * len(sides)
    views: RandomViews[tuple[Tensor, ...]] = RandomViews(sides, recipes)
    for epoch in range(2):
        with NoBlockingCopies() as counted, NoTensorsOfNumbers():
            views(images, np.arange(64), epoch)
        assert counted.count == copies  # boxes; then for each side, rows and factors


def test_a_probe_waits_for_nothing(images: Path, tmp_path: Path) -> None:
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=4", "--online_probe=true")))
    assert run.probe is not None
    run.probe.to(META)
    with NoBlockingCopies(), NoTensorsOfNumbers():
        run.probe.learn(torch.zeros(4, run.model.num_features, device=META), np.arange(4))


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


# What is known one step later

LATER = """
import runpy, sys
from vicreg_hf.training import step
step.UNREAD["cpu"] = 1
sys.argv[:] = ["scripts/pretrain.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""pretrain.py, whose votes are read one step later, as on a GPU."""


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verdicts.UNREAD, "cpu", 1)


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def without_rates(directory: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "views_per_second"} for r in metrics(directory)]


@pytest.mark.usefixtures("later")
def test_a_vote_is_read_one_step_later_unless_something_is_kept(
    images: Path, tmp_path: Path
) -> None:
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=4")))
    run.wrapped.train()
    asked = Verdicts(run)
    steps = []
    for views in views_from_here(run):
        step = take_gradients(run, views)
        if step.number == 2:
            step.output.loss = step.output.loss * torch.nan  # pyright: ignore
        asked.ask(step, stopping=step.number == 1)
        steps.append(step)
        take_step(run)
        if step.number == 1:
            assert asked.read(everything=False) == (None, False, False)
        elif step.number == 2:  # asked to stop, so that it is about to be saved
            assert asked.read(everything=False) == (step, True, False)
            break
    asked = Verdicts(run)
    asked.ask(steps[1])
    assert asked.read(everything=False).bad is None
    assert asked.read(everything=True).bad is steps[1]


@pytest.mark.usefixtures("later")
def test_a_run_is_the_same_where_votes_are_read_later(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--max_steps=7", "--save_steps=3", "--logging_steps=5"]
    pretrain(parse_arguments(flags_of(images, tmp_path / "later", *more)))
    monkeypatch.setitem(verdicts.UNREAD, "cpu", 0)
    pretrain(parse_arguments(flags_of(images, tmp_path / "at once", *more)))
    assert without_rates(tmp_path / "later") == without_rates(tmp_path / "at once")
    assert saved(tmp_path / "later") == saved(tmp_path / "at once") == ["step-6", "step-7"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("every", [1, 2, 3, 4, 50])
def test_a_step_that_is_not_finite_is_neither_logged_nor_saved(
    every: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, learn = 4, pretraining.take_gradients

    def spoil(run: Run, views: tuple[Any, ...]) -> verdicts.Step:
        step = learn(run, views)
        if step.number == bad:
            for p in run.model.parameters():
                p.grad = torch.full_like(p, torch.nan)
            step.grad_norm = torch.tensor(torch.nan)
        return step

    monkeypatch.setattr(pretraining, "take_gradients", spoil)
    steps = [f"--save_steps={every}", f"--logging_steps={every}", "--max_steps=9"]
    with pytest.raises(FloatingPointError, match=f"must be finite at step {bad}, got"):
        pretrain(parse_arguments(flags_of(images, tmp_path, *steps)))
    kept = [step for step in range(1, bad) if step % every == 0]
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == kept
    assert saved(tmp_path) == [f"step-{step}" for step in kept][-2:]
    found = json.loads((tmp_path / f"not-finite-step-{bad}.json").read_text())
    assert len(found["rows"]) == 16
    assert (found["weights"] is None) == (bad % every != 0)  # as it had been taken


def test_two_processes_end_together_where_votes_are_read_later(
    images: Path, tmp_path: Path
) -> None:
    script = tmp_path / "later.py"
    script.write_text(LATER)
    more = ["--optimizer=sgd", "--base_lr=1e30", "--max_steps=40", "--logging_steps=50"]
    result = run_script(str(script), *flags_of(images, tmp_path / "bad", *more), processes=2)
    assert result.returncode == 1
    assert result.stderr.count("loss and gradients must be finite at step") == 2
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = flags_of(images, whole, "--max_steps=60")
    assert run_script(str(script), *flags, processes=2).returncode == 0
    flags = flags_of(images, stopped, "--max_steps=60")
    both = ranks([str(script), *flags], 2)
    while not (stopped / "metrics.jsonl").is_file() or len(metrics(stopped)) < 4:
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.01)
    both[1].terminate()
    for rank in both:
        rank.communicate(timeout=120)
        assert rank.returncode == 75
    assert run_script(str(script), *flags, processes=2).returncode == 0
    assert without_rates(stopped) == without_rates(whole)


def test_flags_of_tensors_and_of_python_count_alike() -> None:
    flags: list[bool | Tensor] = [True, torch.tensor(True), False, torch.tensor(False)]
    assert Vote(flags, torch.device("cpu")).read() == [True, True, False, False]


def test_what_is_of_no_use_in_training_is_not_kept(images: Path, tmp_path: Path) -> None:
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=4")))
    step = take_gradients(run, next(views_from_here(run)))
    assert "last_hidden_state" not in step.output
