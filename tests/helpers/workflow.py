"""What the whole-workflow tests share: small data sets, and pretraining as users start it."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALL = [
    "--architecture=test_resnet", "--expander_dims=32-32", "--optimizer=lars", "--base_lr=0.3",
    "--batch_size=16", "--logging_steps=1", "--num_workers=0",
]  # fmt: skip
"""Settings with which a step takes milliseconds."""
LIMIT = 900
"""Seconds after which a process counts as hung, also on a busy machine."""


def write_images(folder: Path, *, rows: int = 64, size: tuple[int, int] = (32, 32)) -> Path:
    """A parquet data set of two classes, noise on dark or on light, in splits train and test."""
    rng = np.random.default_rng(0)
    names = datasets.ClassLabel(names=["dark", "light"])
    features = datasets.Features({"picture": datasets.Image(), "kind": names})
    for split, count in {"train": rows, "test": rows // 2}.items():
        kinds = rng.integers(2, size=count)
        pictures = []
        for kind in kinds:
            pixels = rng.integers(0, 128, size=(size[1], size[0], 3)) + 127 * kind
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": kinds}, features=features)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"{split}.parquet")
    return folder


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell, with this interpreter's programs first and no network."""
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ["PATH"]])
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | extra


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=LIMIT
    )


def launch(*flags: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Start scripts/pretrain.py, on several CPU processes if asked."""
    if processes == 1:
        return run(["accelerate", "launch", "scripts/pretrain.py", *flags])
    command = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    return run([*command, "scripts/pretrain.py", *flags], ACCELERATE_USE_CPU="true")


def descendants(pid: int) -> list[int]:
    """Processes that one has started, and what those have, the oldest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError):  # it has just ended
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def kill_all(pid: int) -> None:
    """SIGKILL to a process and all that it has started: a launcher's are in other sessions."""
    for number in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def leave_behind(folder: Path, *, hours: float) -> Path:
    """Leave what a process that was killed that long ago had begun to write."""
    left = folder / f".results.json.{uuid.uuid4()}.partial"
    left.write_text('{"results": [')
    then = time.time() - 3600 * hours
    os.utime(left, (then, then))
    return left


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Let no file grow beyond that many bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
