"""Processes of a run that end, together or alone, where no connection says so."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from warm import Script, ranks
from workflow import SMALL, metrics, write_images

pytestmark = pytest.mark.usefixtures("one_core")

CHANGED = """
import os, runpy, sys, time
import accelerate
from vicreg_hf.training import pretrain as pretraining

how, *sys.argv[1:] = sys.argv[1:]
own_end, own_step = accelerate.Accelerator.end_training, pretraining.take_step

def slow_end(accelerator):
    time.sleep(5)
    own_end(accelerator)

def failing_step(run):
    if run.step == 3:
        raise ValueError("this process alone cannot go on")
    own_step(run)

if os.environ["RANK"] == "1" and how == "ends slowly":
    accelerate.Accelerator.end_training = slow_end
if os.environ["RANK"] == "1" and how == "fails":
    pretraining.take_step = failing_step
try:
    runpy.run_path("scripts/pretrain.py", run_name="__main__")
except SystemExit as end:
    if how != "fails":
        raise
    print(end, flush=True)
    time.sleep(300)  # its connections stay, as those of NCCL inside a machine do
"""
"""Runs pretrain.py with a second process that is not as the first."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def start(how: str, images: Path, folder: Path, steps: int) -> list[Script]:
    """Two processes without a launcher, as under SLURM: the first holds the store of both."""
    script = folder / "changed.py"
    script.write_text(CHANGED)
    flags = [*SMALL, f"--dataset_name={images}", f"--max_steps={steps}", "--save_steps=50"]
    return ranks([str(script), how, *flags, f"--output_dir={folder / 'run'}"], 2)


def test_a_process_that_ends_slowly_does_not_miss_the_others(images: Path, tmp_path: Path) -> None:
    for process in start("ends slowly", images, tmp_path, steps=4):
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == 0, printed
        assert "error" not in printed
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_of_a_run_that_is_stopped_each_process_says_so_by_its_status(
    images: Path, tmp_path: Path
) -> None:
    processes = start("ends slowly", images, tmp_path, steps=10_000)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGUSR1)
    for process in processes:
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == 75, printed
        assert "error" not in printed


def test_a_process_that_fails_alone_ends_the_run(images: Path, tmp_path: Path) -> None:
    first, failing = start("fails", images, tmp_path, steps=10_000)
    try:
        printed = "".join(first.communicate(timeout=120))
        assert first.returncode not in (0, None), printed
        assert "process 1 of 2 has failed, as its own message says; the run ends" in printed
    finally:
        failing.kill()
    assert "this process alone cannot go on" in "".join(failing.communicate(timeout=30))
