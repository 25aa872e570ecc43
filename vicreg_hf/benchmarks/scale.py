"""Training on one process and on several of this machine, which share a global batch."""

from __future__ import annotations

import json
import os
import socket
import statistics
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vicreg_hf.benchmarks.contenders import ours
from vicreg_hf.benchmarks.data import MADE, made_images
from vicreg_hf.benchmarks.measuring import seconds_of, surroundings, table
from vicreg_hf.benchmarks.train import DEFAULTS, WARM_UP
from vicreg_hf.runtime.distributed import wait_for_all
from vicreg_hf.runtime.machine import available_cores
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.setup import setup


def scale(flags: Sequence[str], *, processes: Sequence[int], steps: int, rounds: int) -> str:
    """A table of the time of a step on each number of processes, which are started in turn.

    On CPU every process has as many threads, whatever their number; on GPUs one GPU.

    Args:
        flags: of pretrain.py, over `DEFAULTS`.
        steps: measured in a round.
        rounds: the median counts.

    Raises:
        ValueError: a number of processes that cannot share the batch.
    """
    defaults = () if any(word.startswith("--config") for word in flags) else DEFAULTS
    args = parse_arguments([*defaults, *flags, f"--dataset_name={MADE}"])
    for world in processes:
        if world < 1 or args.batch_size % world:
            raise ValueError(
                "processes must share the batch evenly, got "
                f"{world} processes and batch_size={args.batch_size}."
            )
    threads = max(1, available_cores() // max(processes))
    seconds: dict[int, list[float]] = {world: [] for world in processes}
    where = ""
    with made_images(args) as (run_args, _):
        side = run_args.image_size
        found = Path(str(run_args.output_dir)).with_name("found.json")
        for _ in range(rounds):
            for world in seconds:
                own = (world, threads, _free_port(), run_args, steps, found)
                mp.start_processes(_train, own, nprocs=world, start_method="fork")
                where, took = json.loads(found.read_text())
                seconds[world].append(took)
    medians = {world: statistics.median(each) for world, each in seconds.items()}
    first, alone = next(iter(medians.items()))
    rows = [
        [str(world), str(args.batch_size // world), f"{1000 * took:.1f}",
         f"{args.batch_size / took:.0f}", f"{100 * alone * first / (took * world):.0f} %"]
        for world, took in medians.items()
    ]  # fmt: skip
    settings = (
        f"{args.architecture}, {args.batch_size} images of {side} pixels in all, "
        f"expander {args.expander_dims}, {args.optimizer}; on CPU {threads} threads a process; "
        f"medians of {rounds} rounds of {steps} steps"
    )
    header = ["processes", "images each", "ms a step", "images/s", "efficiency"]
    return f"{where}\n{settings}\n{table(header, rows)}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _train(
    number: int,
    world: int,
    threads: int,
    port: int,
    args: PretrainingArguments,
    steps: int,
    found: Path,
) -> None:
    """Take steps as one of the processes; the first writes the hardware and the time of a step."""
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif torch.cuda.device_count() < world:
        raise ValueError(
            f"every process needs a GPU of its own, got {world} processes and "
            f"{torch.cuda.device_count()} GPUs; lower --processes."
        )
    if world > 1:
        group = {
            "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
        }  # fmt: skip
        os.environ.update({name: str(value) for name, value in group.items()})
    run = setup(args)
    device = run.accelerator.device
    if device.type == "cpu":
        torch.set_num_threads(threads)
    contender = ours(run, run.accelerator.mixed_precision)
    with closing(contender.views()) as views:

        def take(count: int) -> None:
            for pair in islice(views, count):
                contender.step(*pair)

        take(max(WARM_UP, contender.workers))
        wait_for_all()
        took = seconds_of(lambda: take(steps), device) / steps
        wait_for_all()
    if number == 0:
        found.write_text(json.dumps([surroundings(device), took]))
    if dist.is_initialized():
        dist.destroy_process_group()
