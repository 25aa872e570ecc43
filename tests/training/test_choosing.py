"""Steps that are kept: milestones, and the best, whose weights a run publishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from workflow import assert_same_run, interrupt, metrics, train

from vicreg_hf.checkpoints.reading import CheckpointError, read_manifest
from vicreg_hf.modeling_vicreg import VICRegModel

pytestmark = pytest.mark.usefixtures("one_core")

KEEPING = ["--max_steps=5", "--save_steps=3", "--knn_steps=1", "--keep_every=2",
           "--keep_best=effective_rank"]  # fmt: skip


@pytest.fixture(scope="module")
def kept(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best step is neither its last nor among its milestones."""
    run = tmp_path_factory.mktemp("runs") / "kept"
    train(images, run, *KEEPING)
    return run


def best_of(run: Path) -> tuple[int, float]:
    """The first step of the highest rank, by the log."""
    return max(((row["step"], row["sample_effective_rank"]) for row in metrics(run)),
               key=lambda pair: (pair[1], -pair[0]))  # fmt: skip


def steps_in(run: Path) -> set[int]:
    return {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")}


def test_the_best_step_is_published_and_said_and_kept_beside_milestones_and_the_newest(
    kept: Path,
) -> None:
    step, rank = best_of(kept)
    assert step not in (0, 2, 4, 5)
    assert steps_in(kept) == {2, 4, 5, step}
    expected = load_file(kept / "checkpoints" / f"step-{step}" / "model.safetensors")
    found = VICRegModel.from_pretrained(kept / "encoder").state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())
    card = (kept / "encoder" / "README.md").read_text()
    assert f"| weights | those of step {step} of 5 with the highest effective rank of rep" in card
    assert f"representations: {rank:.4g} (a fixed sample of images (train); --keep_best eff" in card
    assert f"| 20-NN top-1 accuracy | {100 * metrics(kept)[step]['knn']:.1f} % |" in card
    assert f"embeddings of the batch of views of step {step};" in card
    best = {"measure": "effective_rank", "step": step, "value": rank,
            "images": "a fixed sample of images (train)"}  # fmt: skip
    assert read_manifest(kept / "checkpoints" / "step-5")["state"]["best"] == best


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_was_killed_or_had_ended_publishes_the_same(
    killed: bool, images: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    if killed:
        interrupt(kept, run)
    else:
        shutil.copytree(kept, run)
    train(images, run, *KEEPING)
    assert_same_run(run, kept)
    assert steps_in(run) == steps_in(kept)
    weights = "encoder/model.safetensors"
    assert (run / weights).read_bytes() == (kept / weights).read_bytes()
    assert f"Its weights are those of step {best_of(kept)[0]} of 5" in capsys.readouterr().out


def test_a_best_checkpoint_that_was_lost_is_never_replaced_in_silence(
    images: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, lost = shutil.copytree(kept, tmp_path / "run"), f"step-{best_of(kept)[0]}"
    shutil.rmtree(run / "checkpoints" / lost)
    with pytest.raises(CheckpointError, match="best checkpoint of a run that has ended must be wh"):
        train(images, run, *KEEPING)
    with pytest.raises(CheckpointError, match="keep_best was effective_rank, is knn"):
        train(images, run, *KEEPING, "--keep_best=knn")
    train(images, run, *KEEPING, "--max_steps=6", "--keep_every=100")
    assert f"{lost} is damaged" in capsys.readouterr().out
    assert steps_in(run) >= {2, 4, 5, 6}  # milestones stay what they were


def test_keeping_changes_nothing_that_is_computed(images: Path, kept: Path, tmp_path: Path) -> None:
    flags = [flag for flag in KEEPING if not flag.startswith("--keep")]
    train(images, tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", kept)
    assert steps_in(tmp_path / "run") == {3, 5}


@pytest.mark.parametrize(("flags", "message"), [
    (["--keep_best=probe"], "keep_best=probe must have a probe to measure; add --online_probe tru"),
    (["--keep_best=knn", "--streaming"], "keep_best=knn needs images with classes .* streams are"),
    (["--keep_best=loss"], "keep_best must be one of none, knn, probe, effective_rank, "),
    (["--monitor_eval_split=test"], "monitor_eval_split must be left out without monitor_datas"),
    (["--monitor_dataset_name=demo", "--online_probe=true"], "online_probe must be false with mo"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_training(
    flags: list[str], message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        train(images, tmp_path / "run", "--max_steps=2", *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
