"""The cores of this machine, the processes of a run, and each one's share of the former."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from vicreg_hf.runtime.distributed import PATIENCE


def available_cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):  # macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_processes(accelerator: Accelerator) -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))


def start_accelerator(*handlers: Any) -> Accelerator:
    """Join the other processes, and give each on CPU its share of the cores.

    Args:
        handlers: further `kwargs_handlers` of Accelerator.

    Raises:
        ValueError: processes were started that accelerate does not count.
    """
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(kwargs_handlers=[*handlers, patience])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"every launched process must take part, got WORLD_SIZE={launched} and "
            f"{accelerator.num_processes} in accelerate; see README, 'Several processes'."
        )
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":  # accelerate says nothing
            said = "warning: mixed precision fp16 is ignored on CPU, which computes in float32."
            accelerator.print(said, file=sys.stderr)
        # accelerate launch sets OMP_NUM_THREADS=1, which leaves all cores but one idle
        torch.set_num_threads(max(1, available_cores() // local_processes(accelerator)))
    return accelerator


def default_num_workers(num_processes: int) -> int:
    """The share of the cores that each process on this machine has for loading workers."""
    cores = available_cores()
    return max(1, min(16, cores // num_processes - (1 if cores > 2 * num_processes else 0)))


def hardware(device: torch.device, processes: int) -> str:
    """The machine in words, for a card."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return (
        f"{available_cores()} cores of {name}, {processes} process{'es' if processes > 1 else ''}"
    )


PACKAGES = ("vicreg-hf", "torch", "timm", "transformers", "accelerate", "datasets")


@cache
def installed_versions() -> dict[str, str]:
    """Versions on which the last bit of a result may depend, as they were at the first call."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that is not installed
            found[name] = version(name)
    return found


def software(*names: str) -> dict[str, str]:
    """Installed versions, for a card or a result, by the name of the import."""
    found = installed_versions()
    return {name: found.get(name.replace("_", "-"), "not installed") for name in names}
