"""Sharing a machine's cores with other programs; to be asked before torch is imported."""

from __future__ import annotations

import os
import time
from pathlib import Path

SPIN = "GOMP_SPINCOUNT"
"""Read by OpenMP when it is loaded: how often a thread looks for work before it sleeps."""
ALONE = 10_000
"""Costs nothing measurable where cores are free, and little where a program begins later."""
SAMPLES, PAUSE = 5, 0.01
"""How often, and after how many seconds each, running programs are counted."""


def share_cores() -> None:
    """Let threads of torch that wait for one another leave their cores to others.

    By default they spin for milliseconds, and on a core that another program wants each short
    operation then takes many times as long. A value that is set already stays.
    """
    if SPIN not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        os.environ[SPIN] = "0" if 2 * _others_running() >= cores else str(ALONE)


def _others_running() -> int:
    """How many threads besides this one are running, at the least of a few moments."""
    counts = [0]
    try:
        for _ in range(SAMPLES):
            running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
            counts.append(int(running) - 1)
            time.sleep(PAUSE)
    except (OSError, IndexError, ValueError):  # only Linux counts them there
        return 0
    return min(counts[1:])
