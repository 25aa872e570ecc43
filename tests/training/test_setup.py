"""The settings reach the model, the optimiser and the checkpoint that a run begins with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from workflow import SMALL, write_images

from vicreg_hf import pretrain
from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=32)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps."""
    directory = tmp_path_factory.mktemp("run")
    pretrain(args_of(images, directory))
    return directory


def args_of(images: Path, output_dir: Path, *more: str) -> PretrainingArguments:
    return parse_arguments(
        [*SMALL, f"--dataset_name={images}", f"--output_dir={output_dir}", "--max_steps=2", *more]
    )


def settings_of_optimizer(run: Run) -> tuple[float, float, bool]:
    (group,) = run.inner_optimizer.param_groups
    return group["weight_decay"], group["eta"], group["clip"]


def test_settings_of_lars_and_of_the_loss_reach_them(images: Path, tmp_path: Path) -> None:
    flags = ["--weight_decay=1e-4", "--lars_eta=0.02", "--lars_clip", "--variance_reduction=sum"]
    given = args_of(images, tmp_path, *flags)
    run = setup(given)
    assert settings_of_optimizer(run) == (1e-4, 0.02, True)
    assert run.model.config.variance_reduction == "sum"
    assert (given.image_size, given.augmentation, given.eval_split) == (None, None, None)
    assert (run.args.image_size, run.args.augmentation, run.args.eval_split) == (
        32, "cifar", "test")  # fmt: skip


def test_weight_decay_and_eta_may_change_in_a_run_and_that_is_said(
    images: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max_steps=3", "--weight_decay=0.5", "--lars_eta=0.02"]
    run = setup(args_of(images, finished, *flags))
    assert run.step == 2
    assert settings_of_optimizer(run)[:2] == (0.5, 0.02)
    assert "weight_decay was 1e-06, is 0.5; lars_eta was 0.001, is 0.02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lars_clip=true", "lars_clip was False, is True"),
        ("--variance_reduction=sum", "variance_reduction was mean, is sum"),
        ("--seed=1", "seed was 0, is 1"),
        ("--dataset_name=other", "the data were 32 images .*, are 40 images"),
    ],
)
def test_a_run_does_not_go_on_with_another_method_or_other_data(
    flag: str, message: str, images: Path, finished: Path, tmp_path: Path
) -> None:
    if flag.endswith("other"):
        flag = f"--dataset_name={write_images(tmp_path / 'other', rows=40)}"
    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        setup(args_of(images, run, flag))


def test_resume_required_without_a_checkpoint_fails(images: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        setup(args_of(images, tmp_path, "--resume=required"))


def test_pretrained_weights_out_of_reach_are_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = r"^pretrained weights of test_resnet must be on the Hub, .* start from random ones; "
    with pytest.raises(ValueError, match=weights):
        setup(args_of(images, tmp_path / "run", "--pretrained"))
