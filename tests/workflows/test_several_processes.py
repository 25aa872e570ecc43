"""Runs of two processes: what they hold together, and how they end together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from warm import has_steps, ranks, run_pretraining, run_script, wait_for
from workflow import SMALL, assert_same_run, interrupt, metrics, train, without, write_images

from vicreg_hf.checkpoints.reading import newest_checkpoint

pytestmark = pytest.mark.usefixtures("one_core")

FLAGS = [*SMALL, "--max_steps=6", "--save_steps=3", "--image_size=32", "--micro_batch_size=8",
         "--online_probe=true", "--max_bad_fraction=0.1"]  # fmt: skip
TERMS = ("loss", "invariance", "variance", "covariance", "embedding_std", "probe_loss")
LATER = """
import runpy, sys
from vicreg_hf.training import step
step.STEPS_BEHIND["cpu"] = 1
sys.argv[:] = ["scripts/pretrain.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""pretrain.py, which reads the results of a check one step later, as on a GPU."""
EACH_IN_ITS_OWN_FOLDER = """
import os, sys
sys.argv.append("--output_dir=" + sys.argv.pop(1 + int(os.environ["RANK"])))
del sys.argv[1]
import runpy
runpy.run_path("scripts/pretrain.py", run_name="__main__")
"""
"""pretrain.py, whose processes are given two folders, as nodes without a common one."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images too large for memory, two of which cannot be used."""
    folder = write_images(tmp_path_factory.mktemp("data") / "parquet", rows=64, size=(80, 70))
    import datasets

    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    cells = table.cast_column("picture", datasets.Image(decode=False))["picture"][:]  # pyright: ignore
    for row in (3, 30):
        cells[row]["bytes"] = b"<html>404</html>"
    columns = {"picture": cells, "kind": table["kind"][:]}  # pyright: ignore
    spoiled = datasets.Dataset.from_dict(columns, features=table.features)  # pyright: ignore
    spoiled.to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def on_two(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes, each with a loading worker."""
    return pretrain_on_two(files, tmp_path_factory.mktemp("runs") / "two")[0]


@pytest.fixture(scope="module")
def on_one(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "one"
    train(files, directory, *FLAGS)
    return directory


def pretrain_on_two(data: Path, output_dir: Path) -> tuple[Path, str]:
    """The directory of a run, and what it printed."""
    own = [f"--dataset_name={data}", f"--output_dir={output_dir}", "--num_workers=1"]
    result = run_pretraining(*FLAGS, *own, processes=2)
    assert result.returncode == 0, result.stderr
    return output_dir, result.stdout


def assert_same_step(actual: Path, expected: Path, number: int) -> None:
    """Two runs compute a step from the same weights, so that it is the same to rounding.

    Terms of the loss are continuous, and about a hundred roundings of float32, 1.2e-7, lie between
    them. A gradient is not, as one rounding may switch a ReLU, and nor is any later step.
    """
    (row,), (other,) = ([r for r in metrics(run) if r["step"] == number and "loss" in r]
                        for run in (actual, expected))  # fmt: skip
    for term in TERMS:
        assert row[term] == pytest.approx(other[term], rel=1e-5), term


def test_two_processes_begin_as_one(on_one: Path, on_two: Path) -> None:
    assert_same_step(on_two, on_one, 1)
    assert metrics(on_two)[-1]["bad_images"] == metrics(on_one)[-1]["bad_images"] == 2
    assert len((on_two / "bad_images.jsonl").read_text().splitlines()) == 2
    manifest = json.loads((on_two / "checkpoints" / "step-6" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert manifest["versions"]["torch"]
    assert manifest["state"]["settings"]["batch_size"] == 16


def test_two_processes_resume_to_the_same_bits(files: Path, on_two: Path, tmp_path: Path) -> None:
    run, _ = pretrain_on_two(files, interrupt(on_two, tmp_path / "run"))
    assert_same_run(run, on_two)


def test_one_process_goes_on_as_two_would_to_rounding(
    files: Path, on_two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupt(on_two, tmp_path / "run")
    train(files, run, *FLAGS)
    assert "but for rounding: processes were 2, are 1" in capsys.readouterr().out
    assert_same_step(run, on_two, 4)
    assert metrics(run)[-1]["step"] == 6


def test_two_processes_go_on_as_one_would_to_rounding(
    files: Path, on_one: Path, tmp_path: Path
) -> None:
    run, printed = pretrain_on_two(files, interrupt(on_one, tmp_path / "run"))
    assert "but for rounding: processes were 1, are 2" in printed
    assert_same_step(run, on_one, 4)
    assert metrics(run)[-1]["step"] == 6


def test_processes_that_see_other_checkpoints_are_refused(
    files: Path, on_two: Path, tmp_path: Path
) -> None:
    # as two nodes whose output_dir is not shared: the second has nothing to resume from
    first = shutil.copytree(on_two, tmp_path / "first")
    script = tmp_path / "node.py"
    script.write_text(EACH_IN_ITS_OWN_FOLDER)
    folders = [str(first), str(tmp_path / "second")]
    result = run_script(str(script), *folders, *FLAGS, f"--dataset_name={files}", processes=2)
    assert result.returncode != 0
    assert "error: every process must see the same checkpoints in" in result.stderr
    assert "the newest is step-6, none" in result.stderr


def test_two_processes_stop_together_before_a_step_that_is_not_finite(
    images: Path, tmp_path: Path
) -> None:
    script = tmp_path / "later.py"
    script.write_text(LATER)
    flags = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}", "--optimizer=sgd",
             "--base_lr=1e30", "--max_steps=40", "--save_steps=1"]  # fmt: skip
    result = run_script(str(script), *flags, processes=2)
    assert result.returncode == 1
    assert result.stderr.count("loss and gradients must be finite at step") == 2
    (report,) = tmp_path.glob("not-finite-step-*.json")
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == json.loads(report.read_text())["checkpoint"]
    assert not damaged
    for value in load_file(newest / "model.safetensors").values():
        assert value.float().isfinite().all()


def test_two_processes_stop_together_when_one_is_asked(images: Path, tmp_path: Path) -> None:
    script = tmp_path / "later.py"
    script.write_text(LATER)
    own = [f"--dataset_name={images}", f"--output_dir={tmp_path}", "--max_steps=100000"]
    both = ranks([str(script), *SMALL, *own], 2)
    wait_for(both[0], lambda: has_steps(tmp_path))
    both[1].terminate()
    for process in both:
        assert " after step " in process.communicate(timeout=120)[1]
        assert process.returncode == 75
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{metrics(tmp_path)[-1]['step']}"
    assert not damaged


@pytest.mark.slow
def test_measuring_changes_nothing_in_a_run_of_lower_precision(
    images: Path, tmp_path: Path
) -> None:
    runs = []
    for every in (1, 100):
        runs.append(tmp_path / str(every))
        flags = [*SMALL, f"--dataset_name={images}", "--max_steps=4", f"--knn_steps={every}"]
        result = run_pretraining(
            *flags, f"--output_dir={runs[-1]}", ACCELERATE_MIXED_PRECISION="bf16"
        )
        assert result.returncode == 0, result.stderr
        rows = metrics(runs[-1])[1:]
        assert ["knn" in row for row in rows] == [every == 1] * 3 + [True]
    knn = {"knn", "knn_images"}
    assert without(knn, runs[0]) == without(knn, runs[1])
