"""The settings reach the model, the optimiser and the checkpoint that a run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
from workflow import SMALL

from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core")


def test_settings_of_lars_and_of_the_loss_reach_them(images: Path, tmp_path: Path) -> None:
    flags = ["--weight_decay=1e-4", "--lars_eta=0.02", "--lars_clip", "--variance_reduction=sum"]
    own = [f"--dataset_name={images}", f"--output_dir={tmp_path}"]
    given = parse_arguments([*SMALL, *own, *flags])
    run = setup(given)
    (group,) = run.inner_optimizer.param_groups
    assert (group["weight_decay"], group["eta"], group["clip"]) == (1e-4, 0.02, True)
    assert run.model.config.variance_reduction == "sum"
    assert (given.image_size, given.augmentation, given.eval_split) == (None, None, None)
    assert (run.args.image_size, run.args.augmentation, run.args.eval_split) == (
        32, "cifar", "test")  # fmt: skip


def test_pretrained_weights_out_of_reach_are_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = r"^pretrained weights of test_resnet must be on the Hub, .* start from random ones; "
    own = [f"--dataset_name={images}", f"--output_dir={tmp_path / 'run'}", "--pretrained"]
    with pytest.raises(ValueError, match=weights):
        setup(parse_arguments([*SMALL, *own]))
