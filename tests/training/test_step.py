"""One step of training, and its check, which a GPU reads one step later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from workflow import SMALL, WHOLE, assert_same_run, metrics, train

from vicreg_hf import VICRegModel
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


@pytest.mark.parametrize(
    ("name", "frozen", "flags"),
    [
        ("test_resnet", ["conv1", "bn1"], []),
        ("test_resnet", ["conv1", "bn1"], ["--gradient_checkpointing=true"]),
        ("test_vit", ["patch_embed"], ["--micro_batch_size=8", "--gradient_checkpointing=true"]),
    ],
    ids=["one pass", "checkpointing", "both savings of memory"],
)
def test_steered_steps_are_those_of_a_plain_loop(
    name: str, frozen: list[str], flags: list[str], images: Path, tmp_path: Path
) -> None:
    run = begun(
        images, tmp_path, f"--architecture={name}", f"--freeze={','.join(frozen)}", *flags,
        "--optimizer=sgd", '--optimizer_args={"momentum": 0.8, "nesterov": false}',
        "--weight_decay=0.01", "--max_grad_norm=2", "--layer_decay=0.7", "--ema_decay=0.6",
    )  # fmt: skip
    model = VICRegModel(run.model.config)
    model.load_state_dict(run.model.state_dict())
    average = {key: value.clone() for key, value in model.state_dict().items()}
    classifier = timm.create_model(name, num_classes=2, **(run.model.config.model_args or {}))
    names = {p: f"backbone.{key}" for key, p in classifier.named_parameters()}
    groups = param_groups_layer_decay(classifier, layer_decay=0.7)
    shares = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    kept = tuple(f"backbone.{part}." for part in frozen)
    trained = {k: p for k, p in model.named_parameters() if not k.startswith(kept)}
    optimizer = torch.optim.SGD(
        [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in trained.values()],
        lr=1.0, momentum=0.8,
    )  # fmt: skip
    for number, views in enumerate(views_from_here(run)):
        rate = run.lr
        step = take_gradients(run, views)
        take_step(run)
        for key, part in model.train().named_modules():
            part.train(not f"{key}.".startswith(kept))
        model(*views).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 2.0)
        assert step.grad_norm.item() == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 2
        for group, key in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = rate * shares.get(key, 1.0)
        optimizer.step()
        model.zero_grad()
        for key, value in model.state_dict().items():
            average[key] = 0.6 * average[key] + 0.4 * value if value.is_floating_point() else value
        close: Any = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(run.model.state_dict(), dict(model.state_dict()), **close)
        torch.testing.assert_close(run.published.state_dict(), average, **close)
        assert number < 4
    assert run.step == 4
    assert not model.state_dict()["expander.0.weight"].equal(average["expander.0.weight"])


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
