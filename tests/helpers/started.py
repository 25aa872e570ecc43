"""Runs that are started, waited for, and compared by what they leave."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from warm import Script
from workflow import metrics

STEPS = 150
"""More than are taken before a signal arrives."""


def start(*flags: str) -> Script:
    """Start a run without waiting for it."""
    return Script(["scripts/pretrain.py", *flags], ACCELERATE_USE_CPU="true")


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
