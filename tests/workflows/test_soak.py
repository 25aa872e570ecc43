"""A run that is disturbed at random moments ends as one that nothing disturbed.

    SOAK_MINUTES=30 SOAK_SEED=1 pytest -m slow tests/workflows/test_soak.py

A seed decides which faults come and when. Runs are killed and asked to stop, alone or on two
processes, their files are truncated, flipped and deleted, their disk is made too small, and each
time the same command is given again. In the end weights and metrics are the same, bit for bit.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workflow import (
    ROOT,
    SMALL,
    assert_same_run,
    descendants,
    environment,
    kill_all,
    write_images,
)

LONGEST = 15.0
"""Seconds a run is left alone at most before its next fault."""
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXPECTED = {75, 1, -signal.SIGKILL, *(128 + number for number in REQUESTS),
            *(-number for number in REQUESTS)}  # fmt: skip
"""Statuses of a run that met a fault; the last of one that Python had hardly begun."""
FAULTS = ("kill", "truncate", "flip", "delete", "SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM twice",
          "kill a part", "disk full")  # fmt: skip


class Soak:
    """One run under faults, and how often it met each."""

    def __init__(self, folder: Path, seed: int, processes: int) -> None:
        self.random, self.processes = random.Random(seed), processes
        self.run, self.log = folder / "disturbed", folder / "printed"
        self.flags = [
            *SMALL, f"--dataset_name={write_images(folder / 'images', rows=128)}",
            "--max_steps=300", "--save_steps=5", "--optimizer=adamw", "--base_lr=1e-3",
            '--model_args={"drop_rate": 0.1, "drop_path_rate": 0.1}',
        ]  # fmt: skip
        self.met: collections.Counter[str] = collections.Counter()

    def start(self, output_dir: Path, *, file_limit: int | None = None) -> subprocess.Popen[bytes]:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        workers = self.random.choice([0, 2])
        limit = (file_limit or resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with self.log.open("ab") as file:
            return subprocess.Popen(
                [*(launcher if self.processes > 1 else [sys.executable]), "scripts/pretrain.py",
                 *self.flags, f"--output_dir={output_dir}", f"--num_workers={workers}"],
                cwd=ROOT, env=environment(ACCELERATE_USE_CPU="true"), stdout=file, stderr=file,
                start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            )  # fmt: skip

    def finish(self, output_dir: Path) -> None:
        assert self.start(output_dir).wait() == 0, self.log.read_text()[-3000:]

    def disturb(self) -> bool:
        """Start the run, and do one thing to it; whether it finished all the same."""
        fault = self.random.choice(FAULTS)
        limit = self.random.randrange(1000, 4_000_000) if fault == "disk full" else None
        process = self.start(self.run, file_limit=limit)
        try:
            status = process.wait(self.random.uniform(0, LONGEST))
            self.met[fault] += status != 0
        except subprocess.TimeoutExpired:
            self.do(fault, process)
            self.met[fault] += 1
            status = process.wait(120)
        assert status in {0, *EXPECTED}, f"{fault}: {status}\n{self.log.read_text()[-3000:]}"
        return status == 0

    def do(self, fault: str, process: subprocess.Popen[bytes]) -> None:
        if fault.startswith("SIG"):
            name = fault.split()[0] if self.processes == 1 else "SIGTERM"
            process.send_signal(signal.Signals[name])
            if fault.endswith("twice"):
                time.sleep(0.7)
                process.send_signal(signal.SIGTERM)
            return
        if fault == "kill a part" and (own := descendants(process.pid)):
            os.kill(self.random.choice(own), signal.SIGKILL)  # a loading worker or a process
            if self.processes > 1:
                return  # the others end by themselves
            time.sleep(1)
        kill_all(process.pid)
        process.wait()
        if fault in ("truncate", "flip", "delete"):
            self.damage(fault)

    def damage(self, how: str) -> None:
        """Change one file of the newest checkpoint."""
        found = (self.run / "checkpoints").glob("step-*")
        newest = max(found, key=lambda path: int(path.name[5:]), default=None)
        if newest is None:
            return
        file = self.random.choice(sorted(newest.iterdir()))
        if how == "truncate":
            os.truncate(file, self.random.randrange(file.stat().st_size))
        elif how == "flip":
            content = bytearray(file.read_bytes())
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            file.write_bytes(content)
        else:
            file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disturbed_run_ends_as_an_undisturbed_one(processes: int, tmp_path: Path) -> None:
    soak = Soak(tmp_path, int(os.environ.get("SOAK_SEED", "0")), processes)
    whole = tmp_path / "whole"
    soak.finish(whole)
    until = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "1"))
    while True:
        ended, over = soak.disturb(), time.monotonic() > until
        if over and not ended:
            soak.finish(soak.run)
        if over or ended:
            assert_same_run(soak.run, whole)
            shutil.rmtree(soak.run)
        if over:
            break
    print(f"{soak.met.total()} faults: {dict(soak.met)}")
