"""Runs that are asked to stop or killed, and go on to the same end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from warm import Script, has_steps, ranks, run_pretraining, wait_for
from workflow import (
    ROOT,
    WHOLE,
    assert_same_run,
    environment,
    flags_of,
    metrics,
    train,
    write_images,
)

from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.data.workers import LoadingError
from vicreg_hf.runtime.signals import REQUESTS, STOPPED, Signals, Stopped
from vicreg_hf.training import pretrain as pretraining
from vicreg_hf.training.run import Run

pytestmark = pytest.mark.usefixtures("one_core")

PRETRAIN = "scripts/pretrain.py"
LONG = ["--max_steps=150", "--save_steps=7"]
"""More steps than are taken before a signal arrives."""


def ask_to_stop(signals: Signals, number: int) -> None:
    os.kill(os.getpid(), number)
    while signals.received is None:
        time.sleep(0.01)


# Asked to stop


@pytest.mark.parametrize(("name", "in_step", "last"), [
    ("take_step", 3, 5),
    ("measure_untrained", 0, 0),  # it does not wait for that, and measures it again
    ("_measurements", 3, 3),  # likewise
])  # fmt: skip
def test_a_run_asked_to_stop_saves_and_goes_on_to_the_same_end(
    name: str, in_step: int, last: int, images: Path, whole_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    signals, function = Signals(), getattr(pretraining, name)

    def ask_first(run: Run, *more: Signals, **settings: Any) -> Any:
        if run.step == in_step:
            ask_to_stop(signals, signal.SIGTERM)
        return function(run, *more, **settings)

    monkeypatch.setattr(pretraining, "Signals", lambda: signals)
    monkeypatch.setattr(pretraining, name, ask_first)
    with pytest.raises(Stopped, match=f"Stopped by SIGTERM after step {last} of 8, which is saved"):
        train(images, tmp_path, *WHOLE)
    monkeypatch.undo()
    newest = tmp_path / "checkpoints" / f"step-{last}"
    assert newest_checkpoint(tmp_path / "checkpoints") == (newest, [])
    assert [row["step"] for row in metrics(tmp_path)[-1:]] == ([last] if last else [])
    train(images, tmp_path, *WHOLE, "--resume=required")
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("number", REQUESTS)
def test_every_request_is_heard_but_what_nohup_has_ignored(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        if number != signal.SIGHUP:
            with Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                ask_to_stop(signals, number)
            assert signals.received == number
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests, too
        with Signals() as signals:
            ask_to_stop(signals, number)
        assert signals.received == number
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_directory_in_use_is_refused_and_a_run_that_was_stopped_ends_with_75(
    images: Path, tmp_path: Path
) -> None:
    flags = flags_of(images, tmp_path, "--max_steps=100000")
    process = Script([PRETRAIN, *flags], ACCELERATE_USE_CPU="true")
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


def test_a_run_asked_to_stop_before_it_begins_says_so(images: Path, tmp_path: Path) -> None:
    words = [sys.executable, PRETRAIN, *flags_of(images, tmp_path, *LONG)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    status, usr1 = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGUSR1 - 1)
    wait_for(process, lambda: bool(int(status.read_text().split("SigCgt:")[1].split()[0], 16)
                                   & usr1))  # fmt: skip
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "Stopped before the run began." in printed


HEARS = """
import signal, time
from vicreg_hf.runtime.signals import Signals, name_of
with Signals() as signals:
    print("begun", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("Stopped by " + name_of(signals.received), flush=True)
    if signals.received == signal.SIGTERM:
        import torch
        x = torch.ones(8000, 8000)
        while True:
            x = x @ x  # a single long operation
"""


def test_a_second_request_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "hears.py").write_text(HEARS)
    process = Script([str(tmp_path / "hears.py")])
    for awaited in ("begun", "Stopped by SIGTERM"):
        wait_for(process, lambda awaited=awaited: awaited in process.printed[0])
        time.sleep(1)  # else both are one request
        process.terminate()
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert "SIGTERM: finishing the step and saving" in process.printed[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 10


def test_a_single_process_hears_when_its_launcher_is_killed(tmp_path: Path) -> None:
    launcher, script = tmp_path / "accelerate", tmp_path / "hears.py"  # the name is a launcher's
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, sys.argv[1]])")
    script.write_text(HEARS)
    with subprocess.Popen(
        [sys.executable, launcher, script], cwd=ROOT, env=environment(PYTHONPATH="."),
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == "Stopped by the end of its launcher\n"


# Killed


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "another process of this run has ended"),
        pytest.param(
            signal.SIGSTOP, "process 1 of 2 gave no sign of life for 20 seconds",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_when_one_of_two_processes_is_lost_both_end_and_a_restart_goes_on(
    number: signal.Signals, message: str, images: Path, tmp_path: Path
) -> None:
    process, lost = ranks([PRETRAIN, *flags_of(images, tmp_path, *LONG)], 2)
    wait_for(process, (tmp_path / "checkpoints" / "step-7").is_dir)
    lost.send_signal(number)
    try:
        assert message in "".join(process.communicate(timeout=60))
        assert process.returncode != 0
    finally:
        lost.kill()
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    last = int(newest.name.removeprefix("step-")) + 2
    rows = train(images, tmp_path, *LONG, f"--max_steps={last}")
    assert [row["step"] for row in rows] == list(range(last + 1))


def test_when_a_loading_worker_is_killed_the_run_ends_and_a_restart_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_images(tmp_path / "images", size=(80, 70))  # too large for memory
    flags = ["--image_size=32", "--max_steps=9", "--save_steps=3"]
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
    assert [row["step"] for row in train(data, tmp_path / "run", *flags)] == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_disturbed_at_ten_random_moments_a_run_ends_the_same(
    processes: int, images: Path, tmp_path: Path
) -> None:
    chance = random.Random(processes)
    run, more = tmp_path / "run", [*LONG, "--knn_steps=40", "--online_probe=true"]
    for _ in range(10):
        own = ranks([PRETRAIN, *flags_of(images, run, *more)], processes)
        time.sleep(chance.uniform(0, 8))
        number = chance.choice([signal.SIGKILL, *REQUESTS])
        for process in own:
            process.send_signal(number)
        printed = ["".join(process.communicate(timeout=120)) for process in own]
        assert {0, 1, STOPPED, -number}.issuperset(p.returncode for p in own), printed
        saved = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
        # With its only checkpoint damaged a run refuses to start, as test_resuming shows.
        if len(saved) > 1 and chance.random() < 0.5:
            file = chance.choice(sorted(saved[-1].iterdir()))
            os.truncate(file, file.stat().st_size // 2)
    whole = tmp_path / "whole"
    for directory in (run, whole):
        done = run_pretraining(*flags_of(images, directory, *more), processes=processes)
        assert done.returncode == 0, done.stderr
    assert_same_run(run, whole)
