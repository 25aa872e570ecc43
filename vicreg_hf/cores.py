"""The cores of this machine, and the share of a process."""

from __future__ import annotations

import os
from contextlib import suppress

from accelerate import Accelerator


def available_cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):  # macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_processes(accelerator: Accelerator) -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))


def default_num_workers(num_processes: int) -> int:
    """Loading workers for one of the processes on this machine: its share of the cores."""
    cores = available_cores()
    return max(1, min(16, cores // num_processes - (1 if cores > 2 * num_processes else 0)))
