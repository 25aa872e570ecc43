"""Sharing a machine's cores with other programs; to be asked before torch is imported."""

from __future__ import annotations

import os
import time
from pathlib import Path

SPIN = "GOMP_SPINCOUNT"
"""Read by OpenMP when it is loaded: how often a thread looks for work before it sleeps."""
SPINS = 10_000
"""The number of looks where cores are free: fewer than OpenMP's own 300,000, in case another
program begins later, and enough to cost nothing that could be measured."""
SAMPLES, PAUSE = 5, 0.01
"""How often running threads are counted, and the seconds between two counts."""


def share_cores() -> None:
    """Let threads of torch that wait for one another leave their cores to others.

    By default they spin for milliseconds, and on a core that another program wants each short
    operation then takes many times as long. A value that is set already stays.
    """
    if SPIN not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        busy = 2 * _others_running() >= (os.cpu_count() or 1)
        os.environ[SPIN] = "0" if busy else str(SPINS)


def _others_running() -> int:
    """The number of threads on the machine that run all the time, besides those of this run."""
    own, counts = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), []
    try:
        for _ in range(SAMPLES):
            running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
            counts.append(int(running) - own)
            time.sleep(PAUSE)
    except (OSError, IndexError, ValueError):  # only Linux counts them there
        return 0
    return max(0, min(counts))
