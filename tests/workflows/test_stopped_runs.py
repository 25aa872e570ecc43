"""Runs that are asked to stop or killed, and go on to the same end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import Script, has_steps, ranks, wait_for
from workflow import (
    ROOT,
    SMALL,
    WHOLE,
    assert_same_run,
    environment,
    metrics,
    train,
    write_images,
)

from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.data.workers import LoadingError
from vicreg_hf.runtime.signals import Signals, Stopped
from vicreg_hf.training import pretrain as pretraining
from vicreg_hf.training.run import Run

pytestmark = pytest.mark.usefixtures("one_core")

LONG = [*SMALL, "--max_steps=150", "--save_steps=7"]
"""More steps than are taken before a signal arrives."""


def ended(process: Script, within: float = 60) -> str:
    """Output of a run that must end by itself, with an error."""
    begun = time.monotonic()
    printed = "".join(process.communicate(timeout=2 * within))
    assert time.monotonic() - begun < within, printed
    assert process.returncode != 0, printed
    return printed


def ask_to_stop(signals: Signals, number: int) -> None:
    os.kill(os.getpid(), number)
    while signals.received is None:
        time.sleep(0.01)


# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_asked_to_stop_saves_and_goes_on_to_the_same_end(
    number: signal.Signals, images: Path, whole_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fit, take_step = pretraining.fit, pretraining.take_step

    def fit_until_asked(run: Run, signals: Signals) -> None:
        def ask_in_step_4(run: Run) -> None:
            if run.step == 3:
                ask_to_stop(signals, number)
            take_step(run)

        monkeypatch.setattr(pretraining, "take_step", ask_in_step_4)
        fit(run, signals)

    monkeypatch.setattr(pretraining, "fit", fit_until_asked)
    with pytest.raises(Stopped, match=f"Stopped by {number.name} after step 5 of 8, which is sav"):
        train(images, tmp_path, *WHOLE)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "checkpoints") == (tmp_path / "checkpoints/step-5", [])
    assert metrics(tmp_path)[-1]["step"] == 5
    train(images, tmp_path, *WHOLE)
    assert_same_run(tmp_path, whole_run)


def test_a_run_asked_to_stop_while_it_measures_does_not_wait_and_measures_it_again(
    images: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = pretraining.measure_untrained

    def ask_and_measure(run: Run, signals: Signals) -> None:
        ask_to_stop(signals, signal.SIGTERM)
        measure(run, signals)

    monkeypatch.setattr(pretraining, "measure_untrained", ask_and_measure)
    with pytest.raises(Stopped, match="after step 0 of 8"):
        train(images, tmp_path, *WHOLE)
    monkeypatch.undo()
    assert not metrics(tmp_path)
    train(images, tmp_path, *WHOLE, "--resume=required")
    assert_same_run(tmp_path, whole_run)


def test_a_directory_in_use_is_refused_and_a_run_that_was_stopped_ends_with_75(
    images: Path, tmp_path: Path
) -> None:
    flags = [*LONG, "--max_steps=100000", f"--dataset_name={images}", f"--output_dir={tmp_path}"]
    process = Script(["scripts/pretrain.py", *flags], ACCELERATE_USE_CPU="true")
    wait_for(process, lambda: has_steps(tmp_path))
    with pytest.raises(ValueError, match="output_dir must not be in use by another run"):
        train(images, tmp_path)
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    step = newest.name.removeprefix("step-")
    assert f"Stopped by SIGTERM after step {step} of 100000" in printed
    assert metrics(tmp_path)[-1]["step"] == int(step)


def test_what_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            ask_to_stop(signals, signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_asked_to_stop_before_it_begins_says_so(images: Path, tmp_path: Path) -> None:
    flags = [*LONG, f"--dataset_name={images}", f"--output_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "scripts/pretrain.py", *flags], cwd=ROOT, env=environment(),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    status, usr1 = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGUSR1 - 1)
    wait_for(process, lambda: bool(int(status.read_text().split("SigCgt:")[1].split()[0], 16)
                                   & usr1))  # fmt: skip
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "Stopped before the run began." in printed


SINGLE_LONG_OPERATION = """
import torch
from vicreg_hf.runtime.signals import Signals
with Signals():
    print("begun", flush=True)
    x = torch.ones(20000, 20000)
    while True:
        x = x @ x
"""


def test_a_second_request_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(SINGLE_LONG_OPERATION)
    process = Script([str(script)])
    wait_for(process, lambda: "begun" in process.printed[0])
    process.terminate()
    wait_for(process, lambda: "SIGTERM: finishing the step and saving" in process.printed[1])
    time.sleep(1)
    process.terminate()
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 10


LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", '''
import time
from vicreg_hf.runtime.signals import Signals, name_of
with Signals() as signals:
    print("begun", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("Stopped by " + name_of(signals.received))
'''])
"""


def test_a_single_process_hears_when_its_launcher_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "accelerate"  # by its name it is a launcher
    script.write_text(LAUNCHER)
    with subprocess.Popen(
        [sys.executable, script], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "begun\n"
        launcher.kill()
        assert launcher.stdout.read() == "Stopped by the end of its launcher\n"


# Killed


def test_when_one_of_two_processes_is_killed_both_end_and_a_restart_goes_on(
    images: Path, tmp_path: Path
) -> None:
    flags = [*LONG, f"--dataset_name={images}", f"--output_dir={tmp_path}"]
    process, killed = ranks(["scripts/pretrain.py", *flags], 2)
    wait_for(process, lambda: (tmp_path / "checkpoints" / "step-7").is_dir())
    killed.kill()
    assert "another process of this run has ended" in ended(process)
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    last = int(newest.name.removeprefix("step-")) + 2
    rows = train(images, tmp_path, *LONG, f"--max_steps={last}")
    assert [row["step"] for row in rows] == list(range(last + 1))


def test_when_a_loading_worker_is_killed_the_run_ends_and_a_restart_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_images(tmp_path / "images", rows=64, size=(80, 70))  # too large for memory
    flags = ["--image_size=32", "--max_steps=12", "--save_steps=3"]
    take_step, before = pretraining.take_step, {*multiprocessing.active_children()}

    def kill_in_step_5(run: Run) -> None:
        take_step(run)
        if run.step == 5:
            (worker,) = {*multiprocessing.active_children()} - before
            worker.kill()

    monkeypatch.setattr(pretraining, "take_step", kill_in_step_5)
    with pytest.raises(LoadingError, match="a loading worker died"):
        train(data, tmp_path / "run", *flags, "--num_workers=1")
    monkeypatch.undo()
    train(data, tmp_path / "run", *flags)
    train(data, tmp_path / "whole", *flags)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_is_silent_ends_the_run(images: Path, tmp_path: Path) -> None:
    flags = [*LONG, f"--dataset_name={images}", f"--output_dir={tmp_path}"]
    process, stuck = ranks(["scripts/pretrain.py", *flags], 2)
    wait_for(process, lambda: has_steps(tmp_path))
    stuck.send_signal(signal.SIGSTOP)
    try:
        assert "process 1 of 2 gave no sign of life for 20 seconds" in ended(process)
    finally:
        stuck.kill()
