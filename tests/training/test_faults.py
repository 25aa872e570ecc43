"""Runs without room, memory or finite numbers, and in the directory of another run."""

from __future__ import annotations

import json
import resource
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from started import STEPS, assert_same_end, start, steps_logged, wait_for
from warm import run_pretraining, run_script
from workflow import SMALL, metrics, run, write_images

from vicreg_hf import PretrainingArguments, pretrain
from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.faults import OutOfMemory, explained

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def flags(images: Path) -> list[str]:
    return [*SMALL, f"--dataset_name={images}", f"--max_steps={STEPS}", "--save_steps=7"]


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
