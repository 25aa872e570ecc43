"""Joining the processes that a script is started as."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from vicreg_hf.runtime.distributed import PATIENCE
from vicreg_hf.runtime.machine import available_cores, local_processes


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
        # accelerate launch sets OMP_NUM_THREADS=1, which leaves all cores but one idle
        torch.set_num_threads(max(1, available_cores() // local_processes(accelerator)))
    return accelerator
