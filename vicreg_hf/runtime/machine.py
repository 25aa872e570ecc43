"""The cores of this machine, the processes of a run, and each one's share of the former."""

from __future__ import annotations

import inspect
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
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import parse_flag_from_env
from torch.nn.parallel import DistributedDataParallel

from vicreg_hf.runtime.distributed import be_patient

SHARDED = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}  # fmt: skip
"""Ways to spread a model over processes that are refused, by what `accelerate launch` sets."""
FSDP = "ACCELERATE_USE_FSDP"
NOT_WITH_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "take more processes instead",
    "FSDP_ACTIVATION_CHECKPOINTING": "use --gradient_checkpointing true instead",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "use --gradient_checkpointing true instead",
}
"""Settings of accelerate's FSDP that are refused, and what to do, by the variable of each."""


def available_cores() -> int:
    """Cores this process may use."""
    with suppress(AttributeError):  # macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_processes(accelerator: Accelerator) -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))


def start_accelerator(*, may_shard: bool = False) -> Accelerator:
    """Join the other processes, and give each on CPU its share of the cores.

    Args:
        may_shard: the caller can shard its model by FSDP2.

    Raises:
        ValueError: processes were started that accelerate does not count, or accelerate was asked
            to spread the model over processes otherwise than the caller can, or to accumulate
            gradients.
    """
    refused = SHARDED if may_shard else SHARDED | {"FSDP": FSDP}
    if asked := [name for name, flag in refused.items() if parse_flag_from_env(flag)]:
        way = " or sharded by FSDP2" if may_shard else ""
        remedy = ", and micro_batch_size or FSDP2 where memory is short" if may_shard else ""
        raise ValueError(
            f"a model must be whole in every process{way}, got {asked[0]} from "
            "accelerate's configuration; choose one of MULTI_GPU, MULTI_CPU or no distribution "
            f"with `accelerate config`{remedy}."
        )
    _check_fsdp()
    accelerator = Accelerator()
    if shards_model(accelerator) and accelerator.scaler is not None:
        raise ValueError(
            "mixed precision must be bf16 or no with FSDP, got fp16, whose loss scale the "
            "processes would not agree on; use --mixed_precision bf16."
        )
    handler: Any = _OwnBuffers(gradient_as_bucket_view=True)
    accelerator.ddp_handler = handler
    if (accumulated := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            "accelerate must not accumulate gradients, which the loss of a whole batch cannot be "
            f"summed from, got gradient_accumulation_steps={accumulated}; set it to 1, and choose "
            "micro_batch_size, which gives the exact gradient in less memory."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"every launched process must take part, got WORLD_SIZE={launched} and "
            f"{accelerator.num_processes} in accelerate; see README, 'Several processes'."
        )
    be_patient()
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":  # accelerate says nothing
            said = "warning: mixed precision fp16 is ignored on CPU, which computes in float32."
            accelerator.print(said, file=sys.stderr)
        # accelerate launch sets OMP_NUM_THREADS=1, which leaves all cores but one idle
        torch.set_num_threads(max(1, available_cores() // local_processes(accelerator)))
    return accelerator


def shards_model(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every parameter, as FSDP2 has it."""
    return accelerator.num_processes > 1 and parse_flag_from_env(FSDP)


def _check_fsdp() -> None:
    if not parse_flag_from_env(FSDP):
        return
    if (number := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"FSDP must be of version 2, got {number} from accelerate's configuration; use "
            "`accelerate launch --use_fsdp --fsdp_version 2` or its fsdp_version."
        )
    for name, remedy in NOT_WITH_FSDP.items():
        if parse_flag_from_env(name):
            setting = name.lower()
            raise ValueError(
                f"{setting} must be false in accelerate's configuration, got true; {remedy}."
            )
    # by default transformers would leave weights out in all processes but one
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if PartialState(parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes == 1:
        os.environ[FSDP] = "false"  # nothing to share out


class _OwnBuffers(DistributedDataParallelKwargs):
    """DDP leaves each process its buffers, which are equal where they must be."""

    def to_kwargs(self) -> dict[str, Any]:
        known = inspect.signature(DistributedDataParallel).parameters
        # torch 2.13 has renamed it
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return super().to_kwargs() | {name: False}


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
    cores = available_cores()
    return (
        f"{cores} core{'s' if cores > 1 else ''} of {name}, "
        f"{processes} process{'es' if processes > 1 else ''}"
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
