"""Runs that are stopped, killed or spoiled, and what they leave."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import photographs, png, table_of
from safetensors.torch import load_file
from warm import Script, ranks, run_pretraining, run_script
from workflow import ROOT, SMALL, descendants, environment, kill_all, metrics, run, write_images

from vicreg_hf import PretrainingArguments, pretrain
from vicreg_hf.arguments import parse_arguments
from vicreg_hf.checkpointing import newest_checkpoint
from vicreg_hf.faults import OutOfMemory, explained

pytestmark = pytest.mark.usefixtures("one_core")

STEPS = 150
"""More than are taken before a signal arrives."""


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


def start(*flags: str) -> Script:
    """Start a run without waiting for it."""
    return Script(["scripts/pretrain.py", *flags], ACCELERATE_USE_CPU="true")


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


def wait_for(process: subprocess.Popen[Any] | Script, reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def steps_logged(directory: Path) -> int:
    log = directory / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def assert_same_end(directory: Path, expected: Path) -> None:
    weights = load_file(expected / "encoder" / "model.safetensors")
    for name, value in load_file(directory / "encoder" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    rows = [[{k: v for k, v in row.items() if k != "views_per_second"} for row in metrics(run)]
            for run in (directory, expected)]  # fmt: skip
    assert rows[0] == rows[1]


# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
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
import pretrain, vicreg_hf.pretraining as training
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


# No room


FULL_DISK = """
import ctypes, os, pathlib, runpy, shutil, subprocess, sys
disk, results, size, *flags = sys.argv[1:]
disk, results = pathlib.Path(disk), pathlib.Path(results)
maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
new_user, new_mounts = 0x10000000, 0x20000  # CLONE_NEWUSER, CLONE_NEWNS
if ctypes.CDLL(None).unshare(new_user | new_mounts):
    sys.exit(77)
for name, content in maps.items():
    pathlib.Path("/proc/self", name).write_text(content)
if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
    sys.exit(77)

def run(printed):
    child = os.fork()
    if not child:
        file = os.open(results / printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv[:] = ["scripts/pretrain.py", *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

(results / "status").write_text(str(run("printed")))
shutil.copytree(disk / "run" / "checkpoints", results / "kept")
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
status = run("again")
shutil.copytree(disk / "run", results / "run")
sys.exit(status)
"""
"""On a disk of its own, in a namespace of its own, where no rights are needed to mount one."""


@pytest.mark.parametrize("size", ["1500k", "2200k"])
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    size: str, images: Path, tmp_path: Path
) -> None:
    disk, results, script = (tmp_path / name for name in ("disk", "results", "script.py"))
    disk.mkdir()
    results.mkdir()
    script.write_text(FULL_DISK)
    flags = [*SMALL, f"--dataset_name={images}", "--max_steps=30", "--save_steps=3",
             "--architecture=test_resnet", f"--output_dir={disk / 'run'}"]  # fmt: skip
    done = run_script(str(script), str(disk), str(results), size, *flags)
    if done.returncode == 77:
        pytest.skip("this system mounts no tmpfs without rights")
    printed = (results / "printed").read_text()
    assert (results / "status").read_text() == "1", done.stderr + printed
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert str(disk / "run") in error
    assert "No space left on device" in error or "StorageFull" in error
    assert "Traceback" not in printed
    assert done.returncode == 0, (results / "again").read_text()
    for path in (results / "kept").glob("step-*"):
        assert newest_checkpoint(results / "kept", before=int(path.name[5:]) + 1)[0] == path
    pretrain(parse_arguments([*SMALL, f"--dataset_name={images}", "--max_steps=30",
                              f"--output_dir={tmp_path / 'whole'}"]))  # fmt: skip
    assert_same_end(results / "run", tmp_path / "whole")


def test_want_of_memory_is_told_with_remedies(images: Path, tmp_path: Path) -> None:
    flags = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}"]
    pretrain(parse_arguments([*flags, "--max_steps=2"]))
    process = start(*flags, "--max_steps=4", "--image_size=1024")
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "error: memory ran out at step 3" in printed
    assert "lower --micro_batch_size, now 16" in printed
    assert "Traceback" not in printed
    assert newest_checkpoint(tmp_path / "checkpoints") == (tmp_path / "checkpoints/step-2", [])


# Numbers that are not finite


def test_a_step_that_is_not_finite_is_not_taken_and_can_be_replayed(
    images: Path, tmp_path: Path
) -> None:
    flags = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}", "--optimizer=sgd",
             "--base_lr=1e30", "--max_steps=40", "--save_steps=1"]  # fmt: skip
    result = run_pretraining(*flags)
    assert result.returncode == 1
    (report,) = tmp_path.glob("not-finite-step-*.json")
    found = json.loads(report.read_text())
    step = found["step"]
    assert f"loss and gradients must be finite at step {step}, got loss" in result.stderr
    assert "lower --base_lr, now 1e+30" in result.stderr
    assert str(report) in result.stderr
    assert len(found["rows"]) == 16
    assert found["gradients"] or not torch.isfinite(torch.tensor(float(found["loss"])))
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{step - 1}" == found["checkpoint"]
    assert not damaged
    for value in load_file(newest / "model.safetensors").values():
        assert torch.isfinite(value.float()).all()
    # By the words of the report.
    again = run(shlex.split(found["replay"]))
    assert again.returncode == 0, again.stderr
    replayed = json.loads((tmp_path / f"replay-step-{step}.json").read_text())
    assert replayed == {key: found[key] for key in replayed}


def test_two_processes_stop_together_before_a_step_that_is_not_finite(
    images: Path, tmp_path: Path
) -> None:
    result = run_pretraining(*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}",
                    "--optimizer=sgd", "--base_lr=1e30", "--max_steps=40", "--save_steps=1",
                    processes=2)  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("loss and gradients must be finite at step") == 2
    (report,) = tmp_path.glob("not-finite-step-*.json")
    newest, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == json.loads(report.read_text())["checkpoint"]
    assert not damaged
    for value in load_file(newest / "model.safetensors").values():
        assert torch.isfinite(value.float()).all()


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


def test_replay_without_a_run_is_refused(tmp_path: Path) -> None:
    result = run_pretraining(f"--output_dir={tmp_path}", "--replay=3")
    assert result.returncode == 1
    assert "error: replay needs the output_dir of a run" in result.stderr


# Other settings, other runs


def test_an_output_directory_in_use_is_refused(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, f"--output_dir={tmp_path}"]
    process = start(*flags[:-2], "--max_steps=100000", flags[-1])
    wait_for(process, lambda: steps_logged(tmp_path) > 1)
    result = run_pretraining(*flags)
    assert result.returncode == 1
    assert "error: output_dir must not be in use by another run" in result.stderr
    assert process.poll() is None
    process.terminate()
    process.communicate()
    assert process.returncode == 75


def test_other_settings_are_named_and_taken(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"dataset_name": str(images), "architecture": "test_resnet", "batch_size": 16,
                "expander_dims": "32-32", "output_dir": str(tmp_path)}  # fmt: skip
    pretrain(PretrainingArguments(**settings, max_steps=2, base_lr=0.1))  # pyright: ignore
    pretrain(PretrainingArguments(**settings, max_steps=3, base_lr=0.2))  # pyright: ignore
    printed = capsys.readouterr().out
    assert "base_lr was 0.1, is 0.2" in printed
    assert "max_steps was 2, is 3" in printed
    assert metrics(tmp_path)[-1]["step"] == 3


def test_batch_seed_and_data_change_when_that_is_said(images: Path, tmp_path: Path) -> None:
    settings = {"dataset_name": str(images), "architecture": "test_resnet",
                "expander_dims": "32-32", "output_dir": str(tmp_path)}  # fmt: skip
    pretrain(PretrainingArguments(**settings, max_steps=2, batch_size=16))  # pyright: ignore
    changed = settings | {"max_steps": 3, "batch_size": 8, "seed": 1, "resume_changed": True}
    changed["dataset_name"] = str(write_images(tmp_path / "other", rows=80))
    pretrain(PretrainingArguments(**changed))  # pyright: ignore
    assert metrics(tmp_path)[-1]["step"] == 3


GPU_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
"""As torch 2.11 raises where the GPU's memory, pinned memory or a library's workspace is short."""


@pytest.mark.parametrize("error", GPU_MEMORY, ids=lambda error: type(error).__name__)
def test_want_of_memory_on_a_gpu_is_told_with_what_helps(error: RuntimeError) -> None:
    args = parse_arguments([])
    with pytest.raises(OutOfMemory, match="lower --micro_batch_size"), explained(args):
        raise error


def test_another_fault_of_a_gpu_is_not_taken_for_want_of_memory() -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError), explained(parse_arguments([])):
        raise error
