"""Output that nobody takes ends no run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from workflow import ROOT, SMALL, environment, metrics, write_images

TALKS = """
import sys
from vicreg_hf.runtime.console import outlive_readers
outlive_readers()
for _ in range(3):
    print("word " * 10_000, flush=True)
    print("word", file=sys.stderr)
print("buffered")
"""


def streams(lost: str) -> dict[str, Any]:
    """Where a process's output goes: a pipe that nobody reads, or a full disk."""
    reading, pipe = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    return {
        "both without a reader": {"stdout": pipe, "stderr": pipe},
        "stdout": {"stdout": pipe, "stderr": subprocess.PIPE},
        "no room for either": {"stdout": full, "stderr": full},
    }[lost]


@pytest.mark.parametrize("lost", ["both without a reader", "stdout", "no room for either"])
def test_what_prints_for_nobody_ends_well(lost: str) -> None:
    done = subprocess.run([sys.executable, "-c", TALKS], cwd=ROOT, check=False, **streams(lost))
    assert done.returncode == 0
    assert done.stderr in (None, b"word\n" * 3)


@pytest.mark.slow
def test_a_run_whose_output_goes_nowhere_ends_well(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", rows=32)
    run = tmp_path / "run"
    flags = [*SMALL, f"--dataset_name={images}", "--max_steps=4", f"--output_dir={run}"]
    done = subprocess.run(
        [sys.executable, "scripts/pretrain.py", *flags], cwd=ROOT, check=False,
        env=environment(ACCELERATE_USE_CPU="true"), **streams("both without a reader"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert metrics(run)[-1]["step"] == 4
    assert (run / "encoder" / "README.md").is_file()
