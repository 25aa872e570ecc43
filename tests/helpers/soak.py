"""Train for a while under faults at random moments, and prove that nothing was lost.

    python tests/soak.py --minutes 30 --seed 0

A seed decides which faults come and when. Runs are killed and asked to stop, alone or on two
processes, their files are truncated, flipped and deleted, their disk is made too small, and each
time the same command is given again. In the end weights and metrics must equal, bit for bit, those
of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from workflow import ROOT, SMALL, descendants, environment, kill_all, metrics, write_images

LONGEST = 20.0
"""Seconds a run is left alone at most before its next fault."""
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXPECTED = {75, 1, -signal.SIGKILL, *(128 + number for number in REQUESTS),
            *(-number for number in REQUESTS)}  # fmt: skip
"""Statuses of a run that met a fault; the last of one that Python had hardly begun."""


class Soak:
    """One run under faults, and what it met."""

    def __init__(self, folder: Path, seed: int, steps: int, processes: int) -> None:
        self.random, self.processes = random.Random(seed), processes
        self.images = write_images(folder / "images", rows=128)
        self.whole, self.disturbed = folder / "whole", folder / "disturbed"
        self.flags = [
            *SMALL, f"--dataset_name={self.images}", f"--max_steps={steps}", "--save_steps=5",
            "--optimizer=adamw", "--base_lr=1e-3", "--architecture=test_resnet",
            '--model_args={"drop_rate": 0.1, "drop_path_rate": 0.1}',
        ]  # fmt: skip
        self.met: collections.Counter[str] = collections.Counter()
        self.log = folder / "printed"

    def start(self, output_dir: Path, *, file_limit: int | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "scripts/pretrain.py", *self.flags]
        if self.processes > 1:
            launcher = ["torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
            command = [*launcher, *command[1:]]
        workers = self.random.choice([0, 2])
        limit = (file_limit or resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with self.log.open("ab") as file:
            return subprocess.Popen(
                [*command, f"--output_dir={output_dir}", f"--num_workers={workers}"],
                cwd=ROOT, env=environment(ACCELERATE_USE_CPU="true"), stdout=file, stderr=file,
                start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            )  # fmt: skip

    def disturb(self) -> bool:
        """Start the run, and do one thing to it; whether it finished all the same."""
        fault = self.random.choice(list(FAULTS))
        file_limit = None
        if fault == "disk full":
            file_limit = self.random.randrange(1000, 4_000_000)
        process = self.start(self.disturbed, file_limit=file_limit)
        try:
            status = process.wait(self.random.uniform(0, LONGEST))
        except subprocess.TimeoutExpired:
            FAULTS[fault](self, process)
            self.met[fault] += 1
            status = process.wait(120)
        else:
            if status:
                self.met[fault] += 1
        if status not in {0, *EXPECTED}:
            raise AssertionError(f"{fault} ended with {status}:\n{self.log.read_text()[-3000:]}")
        return status == 0

    def damage(self, change: Callable[[Path, random.Random], None]) -> None:
        """Change one file of the newest checkpoint."""
        found = sorted(
            (self.disturbed / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:])
        )
        if found:
            change(self.random.choice(sorted(found[-1].iterdir())), self.random)


def ask(number: signal.Signals) -> Callable[[Soak, subprocess.Popen[bytes]], None]:
    def send(soak: Soak, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(number if soak.processes == 1 else signal.SIGTERM)

    return send


def kill(_: Soak, process: subprocess.Popen[bytes]) -> None:
    kill_all(process.pid)


def kill_a_part(soak: Soak, process: subprocess.Popen[bytes]) -> None:
    """A loading worker or one of the processes; the run ends by itself."""
    own = descendants(process.pid)
    if own:
        os.kill(soak.random.choice(own), signal.SIGKILL)
    if soak.processes == 1:
        time.sleep(1)
        kill(soak, process)


def ask_twice(_: Soak, process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def delete(file: Path, _: random.Random) -> None:
    file.unlink()


def and_damage(
    change: Callable[[Path, random.Random], None],
) -> Callable[[Soak, subprocess.Popen[bytes]], None]:
    def kill_and_damage(soak: Soak, process: subprocess.Popen[bytes]) -> None:
        kill(soak, process)
        process.wait()
        soak.damage(change)

    return kill_and_damage


FAULTS: dict[str, Callable[[Soak, subprocess.Popen[bytes]], None]] = {
    "kill": kill,
    "kill, truncate": and_damage(truncate),
    "kill, flip": and_damage(flip),
    "kill, delete": and_damage(delete),
    "SIGTERM": ask(signal.SIGTERM),
    "SIGINT": ask(signal.SIGINT),
    "SIGUSR1": ask(signal.SIGUSR1),
    "SIGTERM twice": ask_twice,
    "kill a part": kill_a_part,
    "disk full": kill,
}


def soak(folder: Path, *, minutes: float, seed: int, steps: int, processes: int) -> str:
    """Disturb a run until the time is over, let it end, and compare; what it met."""
    trial = Soak(folder, seed, steps, processes)
    if trial.start(trial.whole).wait():
        raise AssertionError(trial.log.read_text()[-3000:])
    until, finished = time.monotonic() + 60 * minutes, 0
    while True:
        done = trial.disturb()
        over = time.monotonic() > until
        if not done and over:
            done = trial.start(trial.disturbed).wait() == 0
            if not done:
                raise AssertionError(trial.log.read_text()[-3000:])
        if done:
            compare(trial.disturbed, trial.whole)
            finished += 1
            shutil.rmtree(trial.disturbed)
        if over:
            break
    faults = ", ".join(f"{name} {count}" for name, count in sorted(trial.met.items()))
    return (
        f"seed {seed}, {processes} processes, {steps} steps: {finished} runs ended as undisturbed, "
        f"after {trial.met.total()} faults: {faults}"
    )


def compare(disturbed: Path, whole: Path) -> None:
    weights = load_file(whole / "encoder" / "model.safetensors")
    for name, value in load_file(disturbed / "encoder" / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    rows = [[{k: v for k, v in row.items() if k != "views_per_second"} for row in metrics(run)]
            for run in (disturbed, whole)]  # fmt: skip
    assert rows[0] == rows[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), minutes=args.minutes, seed=args.seed, steps=args.steps,
                   processes=args.processes))  # fmt: skip


if __name__ == "__main__":
    main()
