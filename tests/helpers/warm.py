"""Scripts in processes of their own, forked from one that has imported what takes them seconds.

For tests of what a process does once it runs: what it saves, prints and sends, how it ends and with
what status. It has its flags, environment, outputs and signals as from a shell. Not for what is
read at import (`HF_ENDPOINT`, `HF_HOME`), nor for how a launcher starts it or ends it: for those
there is `workflow.run`.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from workflow import LIMIT, ROOT, environment


class Script:
    """A script that has been started; what `subprocess.Popen` offers for one with two pipes."""

    def __init__(self, words: Sequence[str], **variables: str) -> None:
        self.args = list(words)
        self._outputs = [_folder() / f"{uuid.uuid4()}-{name}" for name in ("out", "err")]
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._process = context().Process(
            target=_become, args=(self.args, environment(**variables), self._outputs, cores)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, *map(str.encode, self.printed))
        return self.printed

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def printed(self) -> tuple[str, str]:
        """Stdout and stderr so far."""
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        return out, err


@functools.cache
def _folder() -> Path:
    """Where forked processes have their output and caches."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def context() -> ForkServerContext:
    """Starts processes that have the imports already."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["imported"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    with pytest.MonkeyPatch.context() as patch:
        # OpenMP's threads are not in a fork, which would wait for them for ever: it starts none
        own = environment(HF_HOME=str(_folder()), PYTHONPATH=path, OMP_NUM_THREADS="1")
        for name, value in own.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return made


def _become(
    words: list[str], variables: dict[str, str], outputs: list[Path], cores: set[int] | None
) -> None:
    """Become the script, in a forked process."""
    assert "imported" in sys.modules
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup pytest` has ignored
    multiprocessing.set_start_method(None, force=True)  # that of its own processes is Python's
    for number, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    if cores is not None:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")


def ranks(words: Sequence[str], processes: int, **variables: str) -> list[Script]:
    """Start a script as each rank of a group of CPU processes, told so as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(processes)
    group = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    return [Script(words, **group, RANK=str(rank), LOCAL_RANK=str(rank), **variables)
            for rank in range(processes)]  # fmt: skip


def run_script(
    *words: str, processes: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, by several ranks if asked.

    Returns:
        The first status that is not 0, and what the ranks printed, one after the other.
    """
    alone = processes == 1
    scripts = [Script(words, **variables)] if alone else ranks(words, processes, **variables)
    try:
        printed = [script.communicate(timeout=LIMIT) for script in scripts]
    finally:
        for script in scripts:
            script.kill()
    status = next((script.returncode for script in scripts if script.returncode), 0)
    out, err = map("".join, zip(*printed, strict=True))
    return subprocess.CompletedProcess(words, status, out, err)


def run_pretraining(
    *flags: str, processes: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run scripts/pretrain.py to its end, on several CPU processes if asked."""
    return run_script("scripts/pretrain.py", *flags, processes=processes, **variables)


def wait_for(process: subprocess.Popen[Any] | Script, reached: Callable[[], bool]) -> None:
    """Wait until a process that goes on has reached something."""
    until = time.monotonic() + LIMIT
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def has_steps(directory: Path, number: int = 3) -> bool:
    """Whether a run has logged more rows than that."""
    log = directory / "metrics.jsonl"
    return log.is_file() and log.read_text().count("\n") > number
