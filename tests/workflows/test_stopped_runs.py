"""Runs that are asked to stop or killed, and go on to the same end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pictures import photographs, png, table_of
from started import STEPS, assert_same_end, start, steps_logged, wait_for
from warm import Script, ranks, run_pretraining, run_script
from workflow import ROOT, SMALL, descendants, environment, kill_all, metrics, write_images

from vicreg_hf import pretrain
from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.runtime.signals import Signals
from vicreg_hf.settings.command_line import parse_arguments

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def flags(images: Path) -> list[str]:
    return [*SMALL, f"--dataset_name={images}", f"--max_steps={STEPS}", "--save_steps=7"]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(parse_arguments([*flags, f"--output_dir={directory}"]))
    return directory


def start_cold(*flags: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a run as a shell does, by itself or by a launcher."""
    command = [*(launcher or [sys.executable]), "scripts/pretrain.py", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(ACCELERATE_USE_CPU="true"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


TWO_PROCESSES = ["torchrun", "--standalone", "--nproc_per_node=2"]


def ended(process: subprocess.Popen[str] | Script, within: float = 60) -> str:
    """What a run prints that must end by itself, and not well."""
    begun = time.monotonic()
    printed = "".join(filter(None, process.communicate(timeout=2 * within)))
    assert time.monotonic() - begun < within, printed
    assert process.returncode != 0, printed
    return printed


# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_asked_to_stop_saves_and_goes_on_to_the_same_end(
    number: signal.Signals, flags: list[str], whole: Path, tmp_path: Path
) -> None:
    flags = [*flags, f"--output_dir={tmp_path}"]
    process = start(*flags)
    wait_for(process, lambda: steps_logged(tmp_path) > 3)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert f"Stopped by {number.name} after step" in printed
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert f"after step {newest.name.removeprefix('step-')} of {STEPS}" in printed
    assert metrics(tmp_path)[-1]["step"] == int(newest.name.removeprefix("step-"))
    pretrain(parse_arguments(flags))
    assert_same_end(tmp_path, whole)


ASKED_WHILE_IT_MEASURES = """
import os, signal, sys, time
sys.path.insert(0, "scripts")
import pretrain, vicreg_hf.training.pretrain as training
measure = training.measure
def asked(run, signals):
    if run.accelerator.is_main_process:
        os.kill(os.getpid(), signal.SIGTERM)
        while signals.received is None:
            time.sleep(0.01)
    measure(run, signals)
training.measure = asked
pretrain.main()
"""


def test_a_run_asked_to_stop_while_it_measures_does_not_wait_for_that(tmp_path: Path) -> None:
    """24,000 images of 128 pixels take minutes."""
    process = start("--dataset_name=demo", "--architecture=test_vit3", "--batch_size=4",
                    "--image_size=128", f"--output_dir={tmp_path}", "--expander_dims=32-32",
                    "--max_steps=3", "--num_workers=1")  # fmt: skip
    wait_for(process, lambda: (tmp_path / "config.yaml").is_file())
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "after step 0 of 3" in printed
    assert steps_logged(tmp_path) == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_measured_before_the_first_step_is_there_after_a_stop_in_it(
    processes: int, flags: list[str], tmp_path: Path
) -> None:
    few = [*flags, "--max_steps=3", f"--output_dir={tmp_path / 'whole'}"]
    assert run_pretraining(*few, processes=processes).returncode == 0
    stopped = [*few[:-1], f"--output_dir={tmp_path / 'stopped'}"]
    script = tmp_path / "asked_while_it_measures.py"
    script.write_text(ASKED_WHILE_IT_MEASURES)
    first = run_script(str(script), *stopped, processes=processes)
    assert first.returncode == 75, first.stderr
    assert "Stopped by" in first.stderr
    assert "after step 0 of 3" in first.stderr
    assert steps_logged(tmp_path / "stopped") == 0
    second = run_pretraining(*stopped, "--resume=required", processes=processes)
    assert second.returncode == 0, second.stderr
    assert "encoder at step 0" in second.stdout
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_what_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            while signals.received is None:
                time.sleep(0.01)
        assert signals.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_asked_to_stop_before_it_begins_says_so(flags: list[str], tmp_path: Path) -> None:
    process = start_cold(*flags, f"--output_dir={tmp_path}")
    handled = Path(f"/proc/{process.pid}/status")
    usr1 = 1 << (signal.SIGUSR1 - 1)
    wait_for(process, lambda: bool(int(handled.read_text().split("SigCgt:")[1].split()[0], 16)
                                   & usr1))  # fmt: skip
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "Stopped before the run began." in printed


def test_a_second_request_ends_at_once(tmp_path: Path) -> None:
    # A step of minutes, of which the first forward pass is a single long operation after another.
    # Without labels, so that nothing is measured before.
    rows = table_of([png(photographs(1)[0])]).select([0] * 16384)
    rows.to_parquet(tmp_path / "train.parquet")
    process = start(f"--dataset_name={tmp_path}", "--architecture=test_vit3", "--base_lr=1",
                    "--image_size=128", f"--output_dir={tmp_path / 'run'}", "--batch_size=16384",
                    "--expander_dims=32-32")  # fmt: skip
    wait_for(process, lambda: "pretraining:" in process.printed[1])
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "SIGTERM: finishing the step and saving" in printed
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("to_launcher", [True, False])
def test_two_processes_stop_together(to_launcher: bool, flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, f"--output_dir={tmp_path}"]
    process = start_cold(*flags, launcher=TWO_PROCESSES)
    wait_for(process, lambda: steps_logged(tmp_path) > 3)
    if to_launcher:
        process.terminate()
    else:
        os.kill(descendants(process.pid)[-1], signal.SIGTERM)
    printed, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert printed.count(" after step ") == 2
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert not damaged
    assert metrics(tmp_path)[-1]["step"] == int(newest.name.removeprefix("step-"))


def test_a_single_process_stops_when_its_launcher_is_killed(
    flags: list[str], tmp_path: Path
) -> None:
    command = ["accelerate", "launch", "scripts/pretrain.py", *flags, f"--output_dir={tmp_path}"]
    log = tmp_path / "printed"
    with log.open("w") as file:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
        wait_for(launcher, lambda: steps_logged(tmp_path) > 3)
        (child,) = descendants(launcher.pid)
        launcher.kill()
        launcher.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert "Stopped by the end of its launcher after step" in log.read_text()


# Killed


def test_when_one_of_two_processes_is_killed_both_end_and_a_restart_goes_on(
    flags: list[str], whole: Path, tmp_path: Path
) -> None:
    flags = [*flags, f"--output_dir={tmp_path}"]
    process = start_cold(*flags, launcher=TWO_PROCESSES)
    wait_for(process, lambda: (tmp_path / "checkpoints" / "step-7").is_dir())
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    printed = ended(process)
    assert "another process of this run has ended" in printed or "Signal 9" in printed
    # on one process, whose first steps are those of two to rounding
    again = run_pretraining(*flags)
    assert again.returncode == 0, again.stderr
    assert "Resuming from" in again.stdout
    rows, expected = metrics(tmp_path), metrics(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]


def test_a_process_that_is_silent_ends_the_run(flags: list[str], tmp_path: Path) -> None:
    process, stuck = ranks(["scripts/pretrain.py", *flags, f"--output_dir={tmp_path}"], 2)
    wait_for(process, lambda: steps_logged(tmp_path) > 3)
    stuck.send_signal(signal.SIGSTOP)
    try:
        assert "process 1 of 2 gave no sign of life for 20 seconds" in ended(process)
    finally:
        stuck.kill()


def test_when_a_node_is_lost_the_other_ends_and_a_restart_goes_on(
    flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, f"--output_dir={tmp_path}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        start_cold(*flags, launcher=["torchrun", "--nnodes=2", "--nproc_per_node=1",
                                f"--node_rank={rank}", "--master_addr=127.0.0.1",
                                f"--master_port={port}"])
        for rank in range(2)
    ]  # fmt: skip
    wait_for(nodes[0], lambda: (tmp_path / "checkpoints" / "step-7").is_dir())
    kill_all(nodes[1].pid)
    printed = ended(nodes[0])
    nodes[1].communicate()
    assert "another process of this run has ended" in printed or "no sign of life" in printed
    again = run_pretraining(*flags)
    assert again.returncode == 0, again.stderr
    assert "Resuming from" in again.stdout


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_when_a_loading_worker_is_killed_the_run_ends_and_a_restart_goes_on(
    tmp_path: Path,
) -> None:
    folder = write_images(tmp_path / "images", rows=64, size=(80, 70))
    flags = [*SMALL, f"--dataset_name={folder}", "--image_size=32", "--max_steps=120",
             "--save_steps=7", "--num_workers=2"]  # fmt: skip
    pretrain(parse_arguments([*flags, f"--output_dir={tmp_path / 'whole'}"]))
    flags = [*flags, f"--output_dir={tmp_path / 'run'}"]
    process = start(*flags)
    wait_for(process, lambda: (tmp_path / "run" / "checkpoints" / "step-7").is_dir())
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    printed = ended(process)
    assert "error: a loading worker died" in printed
    assert "Traceback" not in printed
    pretrain(parse_arguments(flags))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


# Replayed


def test_any_step_can_be_replayed(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    before = metrics(directory)
    result = run_pretraining(f"--output_dir={directory}", f"--replay={STEPS}")
    assert result.returncode == 0, result.stderr
    found = json.loads((directory / f"replay-step-{STEPS}.json").read_text())
    for name in ("loss", "invariance", "variance", "covariance", "grad_norm", "lr"):
        assert found[name] == before[-1][name]
    assert metrics(directory) == before
    assert not any(entry for entry in (found["gradients"], found["weights"]))
