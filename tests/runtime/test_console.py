"""Output that nobody takes ends no run."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from workflow import ROOT

TALKS = """
import sys
from vicreg_hf.runtime.console import outlive_readers
outlive_readers()
for _ in range(3):
    print("word " * 10_000, flush=True)
    print("word", file=sys.stderr)
print("buffered")
"""


@pytest.mark.parametrize("lost", ["both without a reader", "stdout", "no room for either"])
def test_what_prints_for_nobody_ends_well(lost: str) -> None:
    reading, pipe = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    streams: dict[str, Any] = {
        "both without a reader": {"stdout": pipe, "stderr": pipe},
        "stdout": {"stdout": pipe, "stderr": subprocess.PIPE},
        "no room for either": {"stdout": full, "stderr": full},
    }[lost]
    done = subprocess.run([sys.executable, "-c", TALKS], cwd=ROOT, check=False, **streams)
    os.close(pipe)
    os.close(full)
    assert done.returncode == 0
    assert done.stderr in (None, b"word\n" * 3)
