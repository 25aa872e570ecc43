"""What the settings say reaches the model and the optimiser that a run trains with."""

from __future__ import annotations

from pathlib import Path

import pytest
from workflow import SMALL, write_images

from vicreg_hf import pretrain
from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=32)


def args_of(images: Path, output_dir: Path, *more: str) -> PretrainingArguments:
    return parse_arguments(
        [*SMALL, f"--dataset_name={images}", f"--output_dir={output_dir}", "--max_steps=2", *more]
    )


def test_settings_of_lars_and_of_the_loss_reach_them(images: Path, tmp_path: Path) -> None:
    flags = ["--weight_decay=1e-4", "--lars_eta=0.02", "--lars_clip", "--variance_reduction=sum"]
    run = setup(args_of(images, tmp_path, *flags))
    (group,) = run.inner_optimizer.param_groups
    assert (group["weight_decay"], group["eta"], group["clip"]) == (1e-4, 0.02, True)
    assert run.model.config.variance_reduction == "sum"


def test_weight_decay_and_eta_may_change_in_a_run_and_that_is_said(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(args_of(images, tmp_path))
    run = setup(args_of(images, tmp_path, "--max_steps=3", "--weight_decay=0.5", "--lars_eta=0.02"))
    assert run.step == 2
    (group,) = run.inner_optimizer.param_groups
    assert (group["weight_decay"], group["eta"]) == (0.5, 0.02)
    assert "weight_decay was 1e-06, is 0.5; lars_eta was 0.001, is 0.02" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--lars_clip=true", "--variance_reduction=sum"])
def test_a_run_does_not_go_on_with_another_method(flag: str, images: Path, tmp_path: Path) -> None:
    pretrain(args_of(images, tmp_path))
    with pytest.raises(CheckpointError, match=f"{flag.partition('=')[0][2:]} was .* is "):
        setup(args_of(images, tmp_path, flag))


def test_pretrained_weights_out_of_reach_are_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = r"^pretrained weights of test_resnet must be on the Hub, .* start from random ones; "
    with pytest.raises(ValueError, match=weights):
        setup(args_of(images, tmp_path / "run", "--pretrained"))
