"""The settings reach the model, the optimiser and the checkpoint that a run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
from workflow import SMALL, train, write_images

from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.monitoring.summary import advice
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


def test_beginners_get_a_line_of_advice_at_the_start_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "own", rows=48)
    (data / "test.parquet").unlink()
    train(data, tmp_path / "run", "--max_steps=1")
    own = [f"--dataset_name={data}", f"--output_dir={tmp_path / 'large'}"]
    large = advice(setup(parse_arguments([*SMALL, *own, "--architecture=resnet18"])))
    lines = (
        "There are no held-out images",
        "48 images are few to learn from: --config small-data-cpu ",
        "resnet18 is large for a CPU",
    )
    for found, line in zip(large, lines, strict=True):
        assert found.startswith(line)
    said = capsys.readouterr().out
    assert [said.count(line) for line in lines] == [1, 1, 0]
    train(data, tmp_path / "run", "--max_steps=2")
    assert not any(line in capsys.readouterr().out for line in lines)
