"""Sessions of one run: what a later one takes over, refuses, or keeps from being lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from safetensors.torch import load_file
from workflow import (
    SMALL,
    WHOLE,
    assert_same_file,
    assert_same_run,
    interrupt,
    metrics,
    train,
    write_images,
)

from vicreg_hf import pretrain
from vicreg_hf.checkpoints.reading import (
    MANIFEST,
    CheckpointError,
    digest,
    newest_checkpoint,
    read_manifest,
)
from vicreg_hf.hub.source import find_encoder
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.setup import make_output_dir, setup

pytestmark = pytest.mark.usefixtures("one_core")

RANDOM = ["--optimizer=adamw", "--base_lr=1e-2", "--micro_batch_size=8", "--image_size=32",
          '--model_args={"drop_rate": 0.3, "drop_path_rate": 0.3}',
          "--max_steps=4", "--save_steps=2"]  # fmt: skip
"""A run with micro-batches and dropout."""


@pytest.fixture
def copied(whole_run: Path, tmp_path: Path) -> Path:
    """A run that has ended after 8 steps, of which 6 and 8 are saved."""
    return shutil.copytree(whole_run, tmp_path / "run")


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a run but its lock."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def begin_and_be_killed(images: Path, output_dir: Path, *flags: str) -> None:
    """As a run that does not reach its first step."""
    own = [f"--dataset_name={images}", f"--output_dir={output_dir}"]
    make_output_dir(setup(parse_arguments([*SMALL, *WHOLE, *own, *flags])))


# Going on


def test_config_yaml_goes_on_with_a_run_that_was_killed_to_the_same_bits(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupt(whole_run, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["image_size"], settings["augmentation"]) == (32, "cifar")
    assert (settings["eval_split"], settings["image_column"]) == ("test", "picture")
    pretrain(parse_arguments([f"--config={run / 'config.yaml'}", f"--output_dir={run}"]))
    printed = capsys.readouterr().out
    assert "settings have changed" not in printed
    assert "step-8 is damaged (model.safetensors has another size)" in printed
    assert f"Resuming from {run / 'checkpoints' / 'step-6'}." in printed  # in mid-epoch
    assert "but for rounding" not in printed
    assert_same_run(run, whole_run)
    weights = "encoder/model.safetensors"
    assert (run / weights).read_bytes() == (whole_run / weights).read_bytes()


def test_so_does_one_with_dropout_micro_batches_and_other_workers(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", rows=64, size=(80, 70))  # too large for memory
    train(data, tmp_path / "whole", *RANDOM, "--num_workers=1")
    run = interrupt(tmp_path / "whole", tmp_path / "run")
    train(data, run, *RANDOM)
    assert_same_run(run, tmp_path / "whole")


STEERED = [*WHOLE, "--optimizer=adamw", "--base_lr=1e-2", "--max_grad_norm=1", "--layer_decay=0.7",
           "--freeze=conv1,bn1", "--ema_decay=0.7", "--gradient_checkpointing=true",
           '--optimizer_args={"betas": [0.8, 0.9]}']  # fmt: skip


def test_so_does_one_that_is_steered_whose_average_is_measured_and_published(
    images: Path, tmp_path: Path
) -> None:
    whole, weights = tmp_path / "whole", "encoder/model.safetensors"
    train(images, whole, *STEERED)
    run = interrupt(whole, tmp_path / "run")
    train(images, run, *STEERED, "--gradient_checkpointing=false")
    assert_same_run(run, whole)
    assert_same_file(run / weights, whole / weights)
    last = run / "checkpoints" / "step-8"
    average, trained = (load_file(last / f"{name}.safetensors") for name in ("average", "model"))
    for name, value in load_file(run / weights).items():
        assert value.equal(average[f"backbone.{name}"])
    assert not average["backbone.layer1.0.conv1.weight"].equal(
        trained["backbone.layer1.0.conv1.weight"]
    )
    probe = [{k: row[k] for k in ("knn", "probe")} for row in metrics(run) if "probe" in row]
    assert len(probe) == 3
    with pytest.raises(CheckpointError, match=r"data, but .*freeze was conv1,bn1, is None\."):
        train(images, run, *STEERED[:-4], *STEERED[-3:], "--max_steps=9")


@pytest.mark.parametrize("flag", ["layer_decay=0.7", "freeze=bn1", "ema_decay=0.5",
                                  'optimizer_args={"momentum":0.5}'])  # fmt: skip
def test_a_setting_that_an_old_checkpoint_does_not_know_had_its_default(
    flag: str, images: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(copied / "checkpoints" / "step-8")
    for name in ("layer_decay", "freeze", "ema_decay", "optimizer_args", "max_grad_norm"):
        del manifest["state"]["settings"][name]
    del manifest["sha256"]
    manifest["sha256"] = digest(manifest)
    (copied / "checkpoints" / "step-8" / MANIFEST).write_text(json.dumps(manifest))
    more = [*WHOLE, "--max_steps=9", "--max_grad_norm=1"]
    with pytest.raises(CheckpointError, match=f"{flag.split('=')[0]} was None, is "):
        train(images, copied, *more, f"--{flag}")
    if flag.startswith("ema"):  # it begins with the checkpoint's weights
        train(images, copied, *more, f"--{flag}", "--resume_changed=true")
        assert "The average begins with the weights of" in capsys.readouterr().out
        assert (copied / "checkpoints" / "step-9" / "average.safetensors").is_file()


def test_what_may_change_the_last_bits_is_named(
    images: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(copied / "checkpoints" / "step-8")
    assert manifest["state"]["threads"] == 1
    manifest["state"] |= {"threads": 2, "precision": "bf16"}
    del manifest["state"]["settings"]["decode"]  # as before there was a choice
    manifest |= {"world_size": 2, "versions": manifest["versions"] | {"torch": "1.0"}}
    del manifest["sha256"]
    manifest["sha256"] = digest(manifest)
    (copied / "checkpoints" / "step-8" / MANIFEST).write_text(json.dumps(manifest))
    begin_and_be_killed(images, copied)
    printed = capsys.readouterr().out
    assert "goes on as it was but for rounding: torch was 1.0, is " in printed
    assert "precision was bf16, is no; processes were 2, are 1; CPU threads of" in printed
    assert "decode=exact, as" in printed
    assert "decode: exact" in (copied / "config.yaml").read_text()
    train(images, copied, *WHOLE)  # and once more
    assert "decode=exact, as" in capsys.readouterr().out


# Settings that change


def test_other_settings_are_named_and_taken_and_another_run_only_on_request(
    images: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*WHOLE, "--max_steps=9"]
    train(images, copied, *more, "--base_lr=0.2", "--sim_coeff=24", "--lars_eta=0.02")
    printed = capsys.readouterr().out
    for change in ("base_lr was 0.3, is 0.2", "max_steps was 8, is 9", "lars_eta was 0.001, is 0"):
        assert change in printed
    assert "sim_coeff: 24.0" in (copied / "encoder" / "README.md").read_text()
    other = tmp_path / "other"
    other.mkdir()
    table = datasets.Dataset.from_parquet(str(images / "train.parquet"))
    rows = [*range(8), *reversed(range(8, 64))]  # which differ after the first images
    table.select(rows).to_parquet(other / "train.parquet")  # pyright: ignore
    shutil.copy(images / "test.parquet", other)
    more = [*WHOLE, "--max_steps=10"]
    for data, flag, message in [
        (other, "--seed=0", "the data were 64 images of SHA-256"),
        (images, "--seed=1", r"keep its model, batch, seed and data, .* seed was 0, is 1\."),
        (images, "--variance_reduction=sum", "variance_reduction was mean, is sum"),
        (images, "--decode=exact", "decode was reduced, is exact"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            train(data, copied, *more, flag)
    changed = ["--seed=1", "--batch_size=8", "--resume_changed=true"]
    assert train(other, copied, *more, *changed)[-1]["step"] == 10


def test_a_run_that_has_ended_is_not_described_with_settings_it_never_had(
    images: Path, copied: Path
) -> None:
    before, another = contents(copied), ["--seed=1", "--resume_changed=true"]
    for changed, message in [
        (["--sim_coeff=24"], r"taken all its steps must .* sim_coeff was 25.0, is 24.0\. .*max_st"),
        (["--online_probe=false"], r"taken all its steps must .* online_probe was True, is False"),
        (another, r"seed was 0, is 1\. .* more --max_steps, and --resume_changed true, to go"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            train(images, copied, *WHOLE, *changed)
    assert contents(copied) == before


def test_its_length_may_be_the_same_in_other_words_or_less_if_it_was_stopped(
    images: Path, copied: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(images, copied, "--num_train_epochs=2", "--save_steps=7", "--online_probe=true")
    fewer = r"must be at least the 8 steps that were taken, got 7 and .*step-8"
    for flag in ("--max_steps=7", "--num_train_epochs=1.75"):
        with pytest.raises(CheckpointError, match=f"^{flag[2:].split('=')[0]} {fewer}"):
            train(images, copied, "--online_probe=true", flag)
    shutil.rmtree(copied / "checkpoints" / "step-8")
    train(images, copied, *WHOLE, "--max_steps=6")
    assert "settings have changed since" in capsys.readouterr().out
    weights = "encoder/model.safetensors"
    assert (copied / weights).read_bytes() != (whole_run / weights).read_bytes()


# Earlier results are not lost


def test_an_earlier_run_is_set_aside_before_another_begins(
    images: Path, copied: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_and_be_killed(images, copied, "--resume=never")
    assert f"is now in {copied / 'earlier-1'}" in capsys.readouterr().out
    assert contents(copied / "earlier-1") == contents(whole_run)
    assert newest_checkpoint(copied / "checkpoints") == (None, [])
    # the same settings again, as config.yaml repeats them, go on and do not start over
    assert parse_arguments([f"--config={copied / 'config.yaml'}"]).resume == "auto"
    train(images, copied, *WHOLE, "--max_steps=1", "--resume=never")
    assert not (copied / "earlier-2").exists()


def test_an_encoder_without_checkpoints_or_of_fewer_steps_goes_aside(
    images: Path, copied: Path, whole_run: Path
) -> None:
    begin_and_be_killed(images, copied, "--max_steps=9")
    assert find_encoder(copied) == copied / "checkpoints" / "step-8"
    assert [path.name for path in (copied / "earlier-1").iterdir()] == ["encoder"]
    shutil.copytree(whole_run / "encoder", copied / "encoder")
    shutil.rmtree(copied / "checkpoints")  # for the room they took
    begin_and_be_killed(images, copied)
    assert {path.name for path in (copied / "earlier-2").iterdir()} == {
        "encoder", "metrics.jsonl", "config.yaml"
    }  # fmt: skip


def test_an_encoder_that_is_whole_is_left_alone_and_else_written_again(
    images: Path, copied: Path, whole_run: Path
) -> None:
    card, picture = (copied / "encoder" / f for f in ("README.md", "pictures/retrievals.png"))
    card.write_text(card.read_text() + "\nby hand\n")
    picture.unlink()
    (copied / "encoder" / ".export-abc").mkdir()  # of an export that was killed
    for name in (None, "config.json", "model.safetensors", "expander.safetensors"):
        if name is not None:
            (copied / "encoder" / name).write_bytes(b"")
        train(images, copied, *WHOLE)
        assert card.read_text().endswith("\nby hand\n")
        assert not picture.exists()
        for file in ("config.json", "model.safetensors", "expander.safetensors"):
            expected = (whole_run / "encoder" / file).read_bytes()
            assert (copied / "encoder" / file).read_bytes() == expected
    assert not (copied / "encoder" / ".export-abc").exists()
    modes = {path.stat().st_mode for path in (copied / "encoder").iterdir() if path.is_file()}
    assert len(modes) == 1  # weights can be read by whoever can read the config
    card.unlink()  # as where it was not written to the end
    train(images, copied, *WHOLE)
    assert card.is_file()


def test_damaged_checkpoints_alone_are_an_error(images: Path, copied: Path) -> None:
    for path in (copied / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"damaged")
    before = contents(copied)
    with pytest.raises(CheckpointError, match=r"every one there is damaged.*--resume never to"):
        train(images, copied, *WHOLE)
    assert contents(copied) == before
    with pytest.raises(CheckpointError, match=r"required, but .* holds no valid checkpoint"):
        train(images, copied / "new", *WHOLE, "--resume=required")


@pytest.mark.parametrize("content", [None, b'{"note": 1}\n[]\n7\n{"step": '])
def test_a_log_that_is_lost_or_spoiled_ends_no_run(
    content: bytes | None, images: Path, copied: Path
) -> None:
    log = copied / "metrics.jsonl"
    kept = log.read_bytes()
    log.unlink()
    if content is not None:
        log.write_bytes(content + kept)
    train(images, copied, *WHOLE, "--max_steps=9")
    steps = [row["step"] for row in metrics(copied)]
    assert steps == ([9] if content is None else list(range(1, 10)))


def test_a_run_whose_log_is_lost_when_all_is_done_ends_well(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "test.parquet").unlink()  # and so without kNN
    for _ in range(2):
        train(tmp_path / "images", tmp_path / "run", "--max_steps=1")
        (tmp_path / "run" / "metrics.jsonl").write_bytes(b"")
