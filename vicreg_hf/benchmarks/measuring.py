"""Times and peak memory of alternatives, measured in turn in one process."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate.utils import patch_environment

from vicreg_hf.runtime.machine import hardware

MIB = 2**20


def median_seconds(
    alternatives: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    max_repeats: int = 20,
) -> dict[str, float]:
    """Time alternatives in turn.

    Args:
        seconds: no further round is begun after this time. The first round, which also warms up,
            counts only where there is no other.
        max_repeats: rounds at most.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    begun = time.perf_counter()
    for _ in range(1 + max_repeats):
        for name, run in alternatives.items():
            times[name].append(seconds_of(run, device))
        if time.perf_counter() - begun > seconds:
            break
    return {name: statistics.median(all_[1:] or all_) for name, all_ in times.items()}


@contextmanager
def memory_process() -> Iterator[ProcessPoolExecutor]:
    """A process in which freed memory goes back at once, so that its peaks can be measured."""
    with (
        # glibc maps allocations of so many bytes or more, and unmaps them when they are freed
        patch_environment(MALLOC_MMAP_THRESHOLD_=MIB // 4),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        pool.submit(os.getpid).result()  # it starts with the first task, and so with the setting
        yield pool


def peak_extra_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """How far memory rises above its present level while something runs, in MiB.

    On CUDA of torch's allocator; elsewhere of the process's resident set, which Linux records.
    None where nothing does.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status_mib("VmRSS")
        run()
        return _status_mib("VmHWM") - before
    except OSError:
        run()
        return None


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """How long something takes, with all that it leaves to a GPU."""
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def surroundings(device: torch.device) -> str:
    """Hardware, torch and commit, for the line above a table."""
    machine = hardware(device, 1).removesuffix(", 1 process")
    if device.type == "cpu":
        machine = f"{torch.get_num_threads()} threads on {machine}"
    return f"{machine}; torch {torch.__version__}, Python {platform.python_version()}; {_commit()}"


def _commit() -> str:
    command = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        described = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return f"commit {described.strip()}"
    return "no commit"
