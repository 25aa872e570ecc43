"""Runs that go on from a checkpoint in mid-epoch, against runs that nothing disturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from warm import run_pretraining, run_script
from workflow import SMALL, metrics, write_images

from vicreg_hf import pretrain
from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.settings.command_line import parse_arguments

pytestmark = [
    pytest.mark.usefixtures("one_core"),
    # on that core torch thinks two workers too many
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

STEPS, EARLIER = 8, 4
"""Of runs whose epochs have five steps: the earlier checkpoint is in the middle of the first."""
DROPPING = '--model_args={"drop_rate": 0.3, "drop_path_rate": 0.3}'
GENTLE = ["--optimizer=sgd", "--base_lr=1e-3"]
"""Steps small enough that differences in rounding stay small."""
RUNS = {
    "lars": [],
    "adamw": ["--optimizer=adamw", "--base_lr=1e-2"],
    "workers": ["--num_workers=2"],
    "micro-batches": ["--micro_batch_size=4"],
    "dropout and drop-path": [DROPPING],
    "all at once": ["--optimizer=adamw", "--base_lr=1e-2", "--num_workers=2", DROPPING,
                    "--micro_batch_size=8"],
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger than what stays in memory, so that loading workers have work."""
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=80, size=(80, 70))


def flags_of(images: Path, output_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"--dataset_name={images}", "--image_size=32", f"--max_steps={STEPS}",
            f"--save_steps={EARLIER}", *more, f"--output_dir={output_dir}"]  # fmt: skip


def interrupted(whole: Path, copy: Path) -> Path:
    """What a run leaves that was killed while it wrote its second checkpoint."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "encoder")
    damaged = copy / "checkpoints" / f"step-{STEPS}" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    newest, _ = newest_checkpoint(copy / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{EARLIER}"
    return copy


def timeless(directory: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "views_per_second"} for row in metrics(directory)]


def assert_same_bits(actual: Path, expected: Path) -> None:
    """Weights, statistics, optimiser state and metrics at the end."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints") / f"step-{STEPS}" / file
        tensors, others = load_file(actual / place), load_file(expected / place)
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            assert torch.equal(value, others[name]), (file, name)
    assert timeless(actual) == timeless(expected)


@pytest.mark.parametrize("more", RUNS.values(), ids=RUNS)
def test_a_resumed_run_ends_with_the_same_bits(
    more: list[str], images: Path, tmp_path: Path
) -> None:
    pretrain(parse_arguments(flags_of(images, tmp_path / "whole", *more)))
    resumed = interrupted(tmp_path / "whole", tmp_path / "resumed")
    pretrain(parse_arguments(flags_of(images, resumed, *more)))
    assert_same_bits(resumed, tmp_path / "whole")


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process."""
    directory = tmp_path_factory.mktemp("runs") / "plain"
    pretrain(parse_arguments(flags_of(images, directory, *GENTLE)))
    return directory


def test_the_number_of_workers_may_change(images: Path, plain: Path, tmp_path: Path) -> None:
    resumed = interrupted(plain, tmp_path / "resumed")
    pretrain(parse_arguments(flags_of(images, resumed, *GENTLE, "--num_workers=2")))
    assert_same_bits(resumed, plain)


def test_dropout_is_there(images: Path, plain: Path, tmp_path: Path) -> None:
    # else equal bits would say nothing of it
    pretrain(parse_arguments(flags_of(images, tmp_path, *GENTLE, DROPPING)))
    assert metrics(tmp_path)[1]["loss"] != metrics(plain)[1]["loss"]


@pytest.fixture(scope="module")
def on_two(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes, each with a loading worker."""
    directory = tmp_path_factory.mktemp("runs") / "two"
    result = run_pretraining(*flags_of(images, directory, *GENTLE, "--num_workers=1"), processes=2)
    assert result.returncode == 0, result.stderr
    return directory


def test_two_processes_resume_to_the_same_bits(images: Path, on_two: Path, tmp_path: Path) -> None:
    resumed = interrupted(on_two, tmp_path / "resumed")
    result = run_pretraining(*flags_of(images, resumed, *GENTLE, "--num_workers=1"), processes=2)
    assert result.returncode == 0, result.stderr
    assert "step-8 is damaged (model.safetensors has another size)" in result.stdout
    assert_same_bits(resumed, on_two)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_on_another_number_of_processes_a_run_is_the_same_to_rounding(
    before: int, after: int, images: Path, plain: Path, on_two: Path, tmp_path: Path
) -> None:
    whole = {1: plain, 2: on_two}[before]
    resumed = interrupted(whole, tmp_path / "resumed")
    result = run_pretraining(*flags_of(images, resumed, *GENTLE), processes=after)
    assert result.returncode == 0, result.stderr
    assert f"but for rounding: processes were {before}, are {after}" in result.stdout
    rows = [row for row in metrics(resumed) if row["step"] > EARLIER]
    assert [row["step"] for row in rows] == [5, 6, 7, 8]
    for row, expected in zip(rows, metrics(whole)[-4:], strict=True):
        for term in ("loss", "invariance", "variance", "covariance", "grad_norm", "embedding_std"):
            assert row[term] == pytest.approx(expected[term], rel=1e-4), (row["step"], term)


def test_another_number_of_cores_is_named(
    images: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest_of = Path("checkpoints") / f"step-{EARLIER}" / "manifest.json"
    printed = {}
    for threads in (1, 2, None):  # None is of a checkpoint that does not say
        resumed = interrupted(plain, tmp_path / f"on-{threads}")
        manifest = json.loads((resumed / manifest_of).read_text())
        assert manifest["state"].pop("threads") == 1
        if threads is not None:
            manifest["state"]["threads"] = threads
        del manifest["sha256"]
        text = json.dumps(manifest, sort_keys=True)
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (resumed / manifest_of).write_text(json.dumps(manifest))
        pretrain(parse_arguments(flags_of(images, resumed, *GENTLE)))
        printed[threads] = capsys.readouterr().out
    assert (
        "The run goes on as it was but for rounding: CPU threads of a process were 2, are 1."
        in (printed[2].splitlines())
    )
    assert "but for rounding" not in printed[1] + printed[None]


def test_processes_that_see_other_checkpoints_are_refused(
    images: Path, on_two: Path, tmp_path: Path
) -> None:
    # As two nodes whose output_dir is not shared: the second has nothing to resume from.
    first = interrupted(on_two, tmp_path / "first")
    script = tmp_path / "node.py"
    script.write_text(
        "import os, sys\n"
        "sys.path.insert(0, 'scripts')\n"
        f"sys.argv.append('--output_dir=' + [{str(first)!r}, {str(tmp_path / 'second')!r}]"
        "[int(os.environ['RANK'])])\n"
        "import pretrain\npretrain.main()\n"
    )
    flags = flags_of(images, first, *GENTLE, "--num_workers=1")[:-1]
    result = run_script(str(script), *flags, processes=2)
    assert result.returncode != 0
    assert "error: every process must see the same checkpoints in" in result.stderr
    assert "the newest is step-4, none" in result.stderr


def test_the_manifest_tells_processes_versions_and_settings(on_two: Path) -> None:
    manifest = json.loads((on_two / "checkpoints" / "step-8" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert manifest["versions"]["torch"]
    assert manifest["state"]["settings"]["batch_size"] == 16
