"""Runs of two processes: what they hold together, and how they end together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from warm import has_steps, ranks, run_pretraining, run_script, wait_for
from workflow import SMALL, assert_same_run, flags_of, interrupt, metrics, without, write_images

from vicreg_hf.checkpoints.reading import newest_checkpoint

pytestmark = pytest.mark.usefixtures("one_core")

FLAGS = ["--max_steps=6", "--save_steps=3", "--image_size=32", "--micro_batch_size=8",
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
    return write_images(tmp_path_factory.mktemp("data") / "parquet", size=(80, 70), bad=(3, 30))


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Undisturbed runs of one process and of two."""
    runs = {number: tmp_path_factory.mktemp("runs") / str(number) for number in (1, 2)}
    for number, directory in runs.items():
        run_on(number, files, directory)
    return runs


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("scripts") / "later.py"
    script.write_text(LATER)
    return str(script)


def run_on(processes: int, data: Path, output_dir: Path, *more: str) -> str:
    """Pretrain, each process with a loading worker; what is printed."""
    flags = flags_of(data, output_dir, *FLAGS, "--num_workers=1", *more)
    result = run_pretraining(*flags, processes=processes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_same_step(actual: Path, expected: Path, number: int) -> None:
    """Two runs compute a step from the same weights, so that it is the same to rounding.

    Terms of the loss are continuous, and about a hundred roundings of float32, 1.2e-7, lie between
    them. A gradient is not, as one rounding may switch a ReLU, and nor is any later step.
    """
    (row,), (other,) = ([r for r in metrics(run) if r["step"] == number and "loss" in r]
                        for run in (actual, expected))  # fmt: skip
    for term in TERMS:
        assert row[term] == pytest.approx(other[term], rel=1e-5), term


def test_two_processes_begin_as_one(whole: dict[int, Path]) -> None:
    one, two = whole.values()
    assert_same_step(two, one, 1)
    assert metrics(two)[0]["knn"] == metrics(one)[0]["knn"]  # before training, shared
    assert metrics(two)[-1]["bad_images"] == metrics(one)[-1]["bad_images"] == 2
    assert len((two / "bad_images.jsonl").read_text().splitlines()) == 2
    manifest = json.loads((two / "checkpoints" / "step-6" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert manifest["versions"]["torch"]
    assert manifest["state"]["settings"]["batch_size"] == 16


@pytest.mark.parametrize(("before", "then"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_on_as_many_processes_exactly_and_else_to_rounding(
    before: int, then: int, files: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    run = interrupt(whole[before], tmp_path / "run")
    printed = run_on(then, files, run)
    if then == before:
        assert_same_run(run, whole[before])
    else:
        assert f"but for rounding: processes were {before}, are {then}" in printed
        assert_same_step(run, whole[before], 4)
        assert metrics(run)[-1]["step"] == 6


@pytest.mark.slow
def test_steered_processes_begin_as_one_and_go_on_exactly(files: Path, tmp_path: Path) -> None:
    steered = ["--max_grad_norm=1", "--layer_decay=0.7", "--freeze=conv1,bn1", "--ema_decay=0.7",
               "--gradient_checkpointing=true"]  # fmt: skip
    for number in (1, 2):
        run_on(number, files, tmp_path / str(number), *steered)
    assert_same_step(tmp_path / "2", tmp_path / "1", 1)
    run = interrupt(tmp_path / "2", tmp_path / "run")
    assert "365,216 of them trained" in run_on(2, files, run, *steered)
    assert_same_run(run, tmp_path / "2")
    files_of = [path.name for path in (run / "checkpoints" / "step-6").iterdir()]
    assert "average.safetensors" in files_of  # which is among those compared


def test_processes_that_see_other_checkpoints_are_refused(
    files: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    # as two nodes whose output_dir is not shared: the second has nothing to resume from
    first = shutil.copytree(whole[2], tmp_path / "first")
    script = tmp_path / "node.py"
    script.write_text(EACH_IN_ITS_OWN_FOLDER)
    folders = [str(first), str(tmp_path / "second")]
    result = run_script(
        str(script), *folders, *SMALL, *FLAGS, f"--dataset_name={files}", processes=2
    )
    assert result.returncode != 0
    assert "error: every process must see the same checkpoints in" in result.stderr
    assert "the newest is step-6, none" in result.stderr


def test_two_processes_stop_together_before_a_step_that_is_not_finite(
    images: Path, later: str, tmp_path: Path
) -> None:
    diverging = ["--optimizer=sgd", "--base_lr=1e30", "--max_steps=40", "--save_steps=1"]
    result = run_script(later, *flags_of(images, tmp_path, *diverging), processes=2)
    assert result.returncode == 1
    assert result.stderr.count("loss and gradients must be finite at step") == 2
    (report,) = tmp_path.glob("not-finite-step-*.json")
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == json.loads(report.read_text())["checkpoint"]
    assert not damaged


def test_two_processes_stop_together_when_one_is_asked(
    images: Path, later: str, tmp_path: Path
) -> None:
    both = ranks([later, *flags_of(images, tmp_path, "--max_steps=100000")], 2)
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
    rows = []
    for every in (1, 100):
        run = tmp_path / str(every)
        flags = flags_of(images, run, "--max_steps=4", f"--knn_steps={every}")
        result = run_pretraining(*flags, ACCELERATE_MIXED_PRECISION="bf16")
        assert result.returncode == 0, result.stderr
        assert ["knn" in row for row in metrics(run)[1:]] == [every == 1] * 3 + [True]
        measured = {key for key in metrics(run)[0] if key.startswith(("knn", "sample_"))}
        rows.append(without(measured, run))
    assert rows[0] == rows[1]
