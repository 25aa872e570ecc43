"""Sessions of one run: what a later one takes over, refuses, or keeps from being lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from warm import run_pretraining
from workflow import SMALL, metrics, write_images

from vicreg_hf import PretrainingArguments, pretrain
from vicreg_hf.checkpoints.reading import CheckpointError, newest_checkpoint
from vicreg_hf.publishing.loading import find_encoder
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.faults import OutOfMemory
from vicreg_hf.training.setup import make_output_dir, setup

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of which an epoch has five steps."""
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=80, size=(80, 70))


def small(images: Path, output_dir: Path, *more: str) -> PretrainingArguments:
    return parse_arguments([*SMALL, f"--dataset_name={images}", "--image_size=32",
                            f"--output_dir={output_dir}", *more])  # fmt: skip


def test_what_an_earlier_run_saved_is_set_aside_before_another_begins(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(small(images, tmp_path, "--max_steps=2"))
    earlier = metrics(tmp_path)
    args = small(images, tmp_path, "--max_steps=2", "--resume=never", "--save_steps=2")
    make_output_dir(setup(args))  # and is killed before it saves
    assert f"is now in {tmp_path / 'earlier-1'}" in capsys.readouterr().out
    assert metrics(tmp_path / "earlier-1") == earlier
    assert (tmp_path / "earlier-1" / "encoder" / "README.md").is_file()
    assert newest_checkpoint(tmp_path / "earlier-1" / "checkpoints")[0] is not None
    assert newest_checkpoint(tmp_path / "checkpoints") == (None, [])
    # the same settings again, as config.yaml repeats them, go on and do not start over
    assert parse_arguments([f"--config={tmp_path / 'config.yaml'}"]).resume == "auto"
    pretrain(small(images, tmp_path, "--max_steps=2", "--resume=never"))
    assert not (tmp_path / "earlier-2").exists()


def test_fewer_steps_than_were_taken_are_refused(images: Path, tmp_path: Path) -> None:
    pretrain(small(images, tmp_path, "--max_steps=3"))
    fewer = r"must be at least the 3 steps that were taken, got 2 and .*step-3"
    with pytest.raises(CheckpointError, match=f"^max_steps {fewer}"):
        pretrain(small(images, tmp_path, "--max_steps=2"))
    with pytest.raises(CheckpointError, match=f"^num_train_epochs {fewer}"):
        pretrain(small(images, tmp_path, "--num_train_epochs=0.4"))
    pretrain(small(images, tmp_path, "--max_steps=3"))  # nothing is left to do


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            "--sim_coeff=24",
            r"taken all its steps must .* sim_coeff was 25.0, is 24.0\. .*max_steps",
        ),
        ("--warmup_epochs=1", r"taken all its steps must .* warmup_epochs was 0.2, is 1.0\."),
        ("--online_probe", r"taken all its steps must .* online_probe was False, is True\."),
        ("--seed=1", r"seed was 0, is 1\. .* more --max_steps, and --resume_changed true, to go"),
    ],
)
def test_a_run_that_has_ended_is_not_described_with_settings_it_never_had(
    changed: str, message: str, images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    described = [run / "encoder" / "README.md", run / "config.yaml"]
    before = [file.read_text() for file in described]
    for more in ([], ["--resume_changed=true"]):
        with pytest.raises(CheckpointError, match=message):
            pretrain(small(images, run, "--max_steps=10", changed, *more))
    assert [file.read_text() for file in described] == before


@pytest.fixture(scope="module")
def ended(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with one step of warm-up."""
    directory = tmp_path_factory.mktemp("runs") / "ended"
    pretrain(small(images, directory, "--max_steps=10", "--save_steps=5"))
    return directory


def test_a_run_that_has_ended_may_be_given_as_long_in_other_words_or_longer(
    images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    pretrain(small(images, run, "--num_train_epochs=2", "--save_steps=7", "--num_workers=1"))
    pretrain(small(images, run, "--max_steps=11", "--sim_coeff=24"))
    assert "sim_coeff: 24.0" in (run / "encoder" / "README.md").read_text()


def test_an_encoder_that_is_written_is_left_alone(
    images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    card = run / "encoder" / "README.md"
    card.write_text(card.read_text() + "\nby hand\n")
    (run / "encoder" / "pictures" / "retrievals.png").unlink()
    pretrain(small(images, run, "--max_steps=10"))
    assert card.read_text().endswith("\nby hand\n")
    assert not (run / "encoder" / "pictures" / "retrievals.png").exists()
    card.unlink()  # as where it was not written to the end
    pretrain(small(images, run, "--max_steps=10"))
    assert card.is_file()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "expander.safetensors"])
def test_an_encoder_that_is_not_whole_is_written_again_under_its_card(
    name: str, images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    card = run / "encoder" / "README.md"
    card.write_text(card.read_text() + "\nby hand\n")
    (run / "encoder" / name).write_bytes(b"")
    pretrain(small(images, run, "--max_steps=10"))
    assert (run / "encoder" / name).read_bytes() == (ended / "encoder" / name).read_bytes()
    assert card.read_text().endswith("\nby hand\n")


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(
    images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    for path in (run / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"damaged")
    before = contents(run)
    with pytest.raises(
        CheckpointError, match=r"every one there is damaged.*--resume never to star"
    ):
        pretrain(small(images, run, "--max_steps=20"))
    assert contents(run) == before
    pretrain(small(images, run, "--max_steps=2", "--resume=never"))
    assert contents(run / "earlier-1") == before


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_passed_over(
    images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    weights = run / "checkpoints" / "step-10" / "model.safetensors"
    aside = weights.rename(tmp_path / "aside")
    weights.symlink_to(weights)  # opened, it is no missing file but an error of the system
    with pytest.raises(
        CheckpointError, match=r"step-10 cannot be read .*; start again when it can"
    ):
        pretrain(small(images, run, "--max_steps=20"))
    weights.unlink()
    aside.rename(weights)
    assert newest_checkpoint(run / "checkpoints")[0] == weights.parent
    assert contents(run) == contents(ended)


def test_what_belongs_to_an_encoder_goes_aside_with_it(
    images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")  # for the room they took
    before = contents(run)
    pretrain(small(images, run, "--max_steps=2"))
    assert contents(run / "earlier-1") == before


def test_an_encoder_of_fewer_steps_is_not_taken_for_the_run_that_goes_on(
    images: Path, ended: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    make_output_dir(setup(small(images, run, "--max_steps=20")))  # and is killed before it saves
    assert find_encoder(run) == run / "checkpoints" / "step-10"
    assert (run / "earlier-1" / "encoder" / "README.md").is_file()
    assert not (run / "earlier-1" / "metrics.jsonl").exists()
    pretrain(small(images, run, "--max_steps=20"))
    assert find_encoder(run) == run / "encoder"
    assert not (run / "earlier-2").exists()


def test_a_run_that_was_stopped_may_end_where_it_is(
    images: Path, ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-10")
    pretrain(small(images, run, "--max_steps=5"))
    assert "settings have changed since" in capsys.readouterr().out
    name = "layer1.0.conv1.weight"
    found, of_ten = (load_file(r / "encoder" / "model.safetensors") for r in (run, ended))
    assert not torch.equal(found[name], of_ten[name])


@pytest.mark.parametrize("content", [None, b"", b"\xff\n", b'{"note": 1}\n[]\n7\n{"step": '])
def test_a_log_that_is_lost_or_spoiled_ends_no_run(
    content: bytes | None, images: Path, tmp_path: Path
) -> None:
    pretrain(small(images, tmp_path, "--max_steps=2"))
    log = tmp_path / "metrics.jsonl"
    if content is None:
        log.unlink()
    else:
        log.write_bytes(content + log.read_bytes())
    pretrain(small(images, tmp_path, "--max_steps=3"))
    steps = [row["step"] for row in metrics(tmp_path)]
    assert steps == ([3] if content is None else [0, 1, 2, 3][content.endswith(b": ") :])


def test_a_run_whose_log_is_lost_when_all_is_done_ends_well(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "test.parquet").unlink()  # and so without kNN
    for _ in range(2):
        pretrain(small(folder, tmp_path / "run", "--max_steps=1"))
        (tmp_path / "run" / "metrics.jsonl").unlink()


def test_a_place_for_checkpoints_that_is_none_is_refused_at_the_start(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(ValueError, match=r"output_dir must be .*/checkpoints'"):
        pretrain(small(images, tmp_path, "--max_steps=2"))
    assert not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path)


def test_data_that_differ_after_the_first_images_are_noticed(images: Path, tmp_path: Path) -> None:
    pretrain(small(images, tmp_path / "run", "--max_steps=1"))
    table = datasets.Dataset.from_parquet(str(images / "train.parquet"))
    (tmp_path / "other").mkdir()
    rows = [*range(8), *reversed(range(8, 80))]
    table.select(rows).to_parquet(tmp_path / "other" / "train.parquet")  # pyright: ignore
    with pytest.raises(CheckpointError, match="the data were 80 images"):
        pretrain(small(tmp_path / "other", tmp_path / "run", "--max_steps=2"))


def test_another_precision_is_named(images: Path, tmp_path: Path) -> None:
    flags = [*SMALL, f"--dataset_name={images}", "--image_size=32", f"--output_dir={tmp_path}"]
    pretrain(parse_arguments([*flags, "--max_steps=1"]))
    again = run_pretraining(*flags, "--max_steps=2", ACCELERATE_MIXED_PRECISION="bf16")
    assert again.returncode == 0, again.stderr
    assert "precision was no, is bf16" in again.stdout


def test_want_of_memory_for_the_model_is_told_before_training(images: Path, tmp_path: Path) -> None:
    args = small(images, tmp_path, "--max_steps=2", "--expander_dims=2000000-2000000")
    with pytest.raises(OutOfMemory, match=r"before the first step.*narrow --expander_dims, now"):
        pretrain(args)


def test_what_a_killed_export_left_goes(images: Path, tmp_path: Path) -> None:
    left = tmp_path / "encoder" / ".export-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    directory = pretrain(small(images, tmp_path, "--max_steps=1"))
    assert not left.exists()
    modes = {path.stat().st_mode for path in directory.iterdir() if path.is_file()}
    assert len(modes) == 1  # weights can be read by whoever can read the config
