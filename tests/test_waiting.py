"""A step never waits for the device: a GPU is given the next one while it computes.

On the meta device nothing has a value, so whatever asks for one fails: `.item()`, `.tolist()`, a
condition, a copy to the host. Copies from the host that wait are caught one by one.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workflow import SMALL, metrics, write_images

from vicreg_hf import TwoViews, pretrain, pretraining
from vicreg_hf.arguments import parse_arguments
from vicreg_hf.checkpointing import newest_checkpoint
from vicreg_hf.distributed import Vote
from vicreg_hf.faults import not_finite
from vicreg_hf.optim import LARS, create_optimizer
from vicreg_hf.preparation import setup
from vicreg_hf.pretraining import take_gradients, take_step
from vicreg_hf.run import Run

pytestmark = pytest.mark.usefixtures("one_core")
META = torch.device("meta")


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
    with NoBlockingCopies():
        step = take_gradients(run, views)
        assert not_finite(run, step).device == META
        take_step(run)
    assert all(p.device == META and p.grad is None for p in run.model.parameters())
    with pytest.raises(RuntimeError):
        step.output.loss.item()  # pyright: ignore


def test_views_wait_for_nothing() -> None:
    images = torch.zeros(8, 3, 40, 40, dtype=torch.uint8, device=META)
    with NoBlockingCopies():
        views = TwoViews(32, "authors")(images, np.arange(8))
    for view in views:
        assert view.device == META
        assert view.shape == (8, 3, 32, 32)


def test_a_probe_waits_for_nothing(images: Path, tmp_path: Path) -> None:
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=4", "--online_probe=true")))
    assert run.probe is not None
    run.probe.to(META)
    with NoBlockingCopies():
        run.probe.learn(torch.zeros(4, run.model.num_features, device=META), np.arange(4))


def test_what_waits_is_caught() -> None:
    x = torch.ones(3)
    with NoBlockingCopies(), pytest.raises(AssertionError, match="waits"):
        x.to(META)
    with NoBlockingCopies(), pytest.raises(AssertionError, match="waits"):
        torch.empty(3, device=META).copy_(x)
    with pytest.raises(RuntimeError):
        bool(torch.empty((), device=META) > 0)


# What is known one step later


@pytest.fixture
def one_step_later(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Votes are read one step later, as on a GPU; says of each whether others followed it."""
    monkeypatch.setitem(pretraining.UNJUDGED, "cpu", 1)
    followed: list[bool] = []
    made: list[Vote] = []
    begin, read = Vote.__init__, Vote.read

    def noted(self: Vote, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    def read_and_noted(self: Vote) -> list[bool]:
        followed.append(made[-1] is not self)
        return read(self)

    monkeypatch.setattr(Vote, "__init__", noted)
    monkeypatch.setattr(Vote, "read", read_and_noted)
    return followed


def test_a_run_is_the_same_where_votes_are_read_later(
    images: Path, tmp_path: Path, one_step_later: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--max_steps=7", "--save_steps=3", "--logging_steps=5"]
    pretrain(parse_arguments(flags_of(images, tmp_path / "later", *more)))
    assert True in one_step_later
    monkeypatch.undo()
    pretrain(parse_arguments(flags_of(images, tmp_path / "at once", *more)))
    later, at_once = (
        [{k: v for k, v in row.items() if k != "views_per_second"} for row in metrics(tmp_path / n)]
        for n in ("later", "at once")
    )
    assert later == at_once
    kept = [sorted(p.name for p in (tmp_path / n / "checkpoints").glob("step-*"))
            for n in ("later", "at once")]  # fmt: skip
    assert kept[0] == kept[1] == ["step-6", "step-7"]


@pytest.mark.usefixtures("one_step_later")
def test_a_step_that_is_not_finite_is_never_saved(images: Path, tmp_path: Path) -> None:
    more = ["--optimizer=sgd", "--base_lr=1e30", "--max_steps=40", "--save_steps=50"]
    flags = flags_of(images, tmp_path, *more, "--logging_steps=50", "--warmup_epochs=1")
    with pytest.raises(FloatingPointError, match="loss and gradients must be finite at step"):
        pretrain(parse_arguments(flags))
    (report,) = tmp_path.glob("not-finite-step-*.json")
    assert newest_checkpoint(tmp_path / "checkpoints") == (None, [])
    assert "loss" not in metrics(tmp_path)[-1]
    assert '"weights": null' in report.read_text()


def test_flags_of_tensors_and_of_python_count_alike() -> None:
    flags: list[bool | Tensor] = [True, torch.tensor(True), False, torch.tensor(False)]
    assert Vote(flags, torch.device("cpu")).read() == [True, True, False, False]
