"""Output that nobody takes ends no run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from workflow import ROOT, SMALL, environment, metrics, write_images

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=32)


def gone() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("lost", ["both without a reader", "stdout", "no room for either"])
def test_a_run_whose_output_goes_nowhere_ends_well(lost: str, images: Path, tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    pipe = gone()
    streams: dict[str, Any] = {
        "both without a reader": {"stdout": pipe, "stderr": pipe},
        "stdout": {"stdout": pipe, "stderr": subprocess.PIPE},
        "no room for either": {"stdout": full, "stderr": full},
    }[lost]
    flags = [*SMALL, f"--dataset_name={images}", "--max_steps=4", f"--output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "scripts/pretrain.py", *flags], cwd=ROOT, check=False,
        env=environment(ACCELERATE_USE_CPU="true"), **streams,
    )  # fmt: skip
    os.close(full)
    os.close(pipe)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path)[-1]["step"] == 4
    assert (tmp_path / "encoder" / "README.md").is_file()
    if lost == "stdout":
        assert b"Error" not in done.stderr
