"""The prediction of `scale` against training on CPU processes of this machine.

What a process takes for its own share of the batch gives the rates, while others that have nothing
to do with it keep the other cores as busy; and as many processes that send trains of small
messages, with as much arithmetic in between as a layer has, give the network's. Nothing is fitted
to what several processes then take in training. Of repetitions the median counts, here and there.

Shapes: B images, S side in pixels, W processes.
"""

from __future__ import annotations

import copy
import math
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import datasets
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vicreg_hf.benchmarks.contenders import ours
from vicreg_hf.benchmarks.data import photographs
from vicreg_hf.benchmarks.loss import embeddings, forward_backward, our_loss
from vicreg_hf.benchmarks.measuring import MIB, run_processes, surroundings, table
from vicreg_hf.benchmarks.scale import BACKWARD, VIEWS, Step, predict
from vicreg_hf.benchmarks.scale_counts import Work, count_work, our_loss_work
from vicreg_hf.benchmarks.scale_machine import Machine
from vicreg_hf.loss.covariance import STRIPE_ROWS
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import gather_rows, sum_over_processes
from vicreg_hf.runtime.machine import available_cores
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import gradient_norms, take_gradients, take_step

CPU = torch.device("cpu")
WITHOUT_LIMIT = 1e6
"""A rate that adds nothing."""
WARM_UP = 2
"""Rounds."""
MESSAGES = 100
"""That follow each other."""
NORM_MESSAGES = 2
"""A view: `SyncBatchNorm` of this package sends one in either direction."""
HEADER = [
    "processes", "backbone", "expander", "loss", "optimizer", "communication", "views",
    "predicted ms", "measured ms", "predicted / measured", "on a core", "us a message", "GB/s",
    "cores of other programs",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is trained, from images made of photographs."""

    architecture: str
    image_size: int
    batch_size: int
    expander_dims: Sequence[int]
    steps: int
    folder: str

    @property
    def images(self) -> str:
        return f"{self.folder}/images"

    def run(self) -> Run:
        """Set up for training in this process, on one core."""
        widths = "-".join(map(str, self.expander_dims))
        words = [
            f"--architecture={self.architecture}", f"--image_size={self.image_size}",
            f"--batch_size={self.batch_size}", f"--expander_dims={widths}", "--augmentation=cifar",
            f"--dataset_name={self.images}", f"--output_dir={self.folder}/run", "--resume=never",
            "--max_steps=1000000", "--num_workers=0", "--compile=false",
        ]  # fmt: skip
        run = setup(parse_arguments(words))
        torch.set_num_threads(1)  # which setup has chosen by the cores
        return run


class Alone(NamedTuple):
    """Seconds that a process takes for each part of a step, of which it sends and receives none."""

    backbone: float
    """Of its own share of the batch, like expander and views."""
    expander: float
    loss: float
    """Of the whole batch."""
    optimizer: float
    views: float


class Loopback(NamedTuple):
    """What W processes take on these cores."""

    message: float
    """Seconds of an all-reduce of one number, of many that follow each other between arithmetic:
    a process that computes is late to send, and one that waits is late to wake."""
    rate: float
    """Bytes/s that each receives in an all-gather."""


def check(
    processes: Sequence[int],
    architecture: str,
    *,
    image_size: int,
    batch_size: int,
    expander_dims: Sequence[int],
    steps: int,
) -> str:
    """A table of predicted and measured milliseconds of a step.

    Args:
        processes: numbers of CPU processes, each on one thread. Beside the time of a step stands
            what its first process had of a core, on average: the rest was waiting.
        steps: measured of each; the median counts.
    """
    cores = available_cores()
    work = count_work(architecture, image_size, expander_dims)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(architecture, image_size, batch_size, expander_dims, steps, folder)
        _write(setting)
        lines = []
        for world in processes:
            alone = Alone(*_in_processes(min(world, cores), _alone, setting, world)[0])
            loopback, network = Loopback(0.0, WITHOUT_LIMIT), ["-", "-"]
            if world > 1:
                gap = alone.backbone / (NORM_MESSAGES * VIEWS * work.norms)
                loopback = Loopback(*_in_processes(world, _loopback, gap)[0])
                network = [f"{1e6 * loopback.message:.0f}", f"{loopback.rate / 1e9:.2f}"]
            step = expected(work, alone, loopback, world, batch_size, cores)
            others = _others()
            answers = _in_processes(world, _step, setting)
            measured, on_core, _ = answers[0]
            busy = others(sum(total for *_, total in answers))
            lines.append([*_line(world, step, measured), f"{1000 * on_core:.1f}", *network, busy])
    torch.set_num_threads(cores)
    head = (
        f"{architecture}, {batch_size} images of {image_size} pixels, expander "
        f"{'-'.join(map(str, expander_dims))}; one thread a process, {cores} cores; median of "
        f"{steps} steps"
    )
    return f"{surroundings(CPU)}\n{head}\n\n{table(HEADER, lines)}"


def expected(
    work: Work, alone: Alone, loopback: Loopback, world: int, batch_size: int, cores: int
) -> Step:
    """The prediction for W processes on so many cores.

    Beyond as many processes as cores all arithmetic takes W / cores times as long. Of communication
    that was measured.
    """
    slower = max(1.0, world / cores)
    share = batch_size / world
    views = (1 + BACKWARD) * VIEWS * share
    expander_rate = _rate(views * work.expander_flops, alone.expander)
    loss = our_loss_work(batch_size, work.dim, 1, stripe=STRIPE_ROWS["cpu"])
    # Its products run as fast as the expander's; the rest of its time is traffic.
    passing = alone.loss - loss.flops / expander_rate
    memory = _rate(loss.traffic, max(passing, 0.0))
    machine = Machine(
        gpus_per_node=world,
        bf16_tflops=1 / slower,
        backbone_share=_rate(views * work.backbone_flops, alone.backbone) / 1e12,
        expander_share=expander_rate / 1e12,
        loss_tflops=expander_rate / 1e12 / slower,
        loss_share=1.0,
        memory_gb_s=memory / 1e9 / slower,
        memory_share=1.0,
        launch_us=0.0,
        nvlink_gb_s=loopback.rate / 1e9,
        link_share=1.0,
        # there and back through a tree
        nvlink_us=1e6 * loopback.message / 2 / max(1, math.ceil(math.log2(world))),
        embedding_bytes=4,
        messages_per_norm=NORM_MESSAGES,
        overlap=False,  # what sends takes the same cores
        crop_images_s=share / alone.views / slower,
        cores_per_node=world,
        read_mb_s=WITHOUT_LIMIT,
        checkpoint_mb_s=WITHOUT_LIMIT,
    )  # fmt: skip
    step = predict(work, machine, world, batch_size, stripe=STRIPE_ROWS["cpu"])
    return replace(step, optimizer=alone.optimizer * slower, input_meanwhile=False)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if amount and seconds else WITHOUT_LIMIT * 1e12


def _line(world: int, step: Step, measured: float) -> list[str]:
    parts = (
        step.backbone, step.expander, step.loss, step.optimizer, step.communication, step.input,
        step.seconds, measured,
    )  # fmt: skip
    figures = [f"{1000 * part:.1f}" for part in parts]
    return [str(world), *figures, f"{step.seconds / measured:.2f}"]


def _others() -> Callable[[float], str]:
    """From now on: how many cores programs that are none of ours keep busy, on average.

    Asked with the seconds of a core that our other processes have had.
    """
    begun, before = time.perf_counter(), _busy()

    def so_far(ours: float) -> str:
        now = _busy()
        if before is None or now is None:
            return "?"
        return f"{max(0.0, now - before - ours) / (time.perf_counter() - begun):.1f}"

    return so_far


def _busy() -> float | None:
    """Seconds of all cores that processes but this have had; None where the kernel is silent."""
    with suppress(OSError):
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()
    return None


# What processes do
def _in_processes(
    world: int, function: Callable[..., Sequence[float]], *args: Any
) -> list[list[float]]:
    """What a function answers in each of several processes.

    Args:
        function: gets `args`, and a path that exists when the first process has its answer.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        run_processes(_start, (world, port, folder, function, args), world)
        answers = [Path(folder, str(rank)).read_text().splitlines() for rank in range(world)]
        return [[float(line) for line in answer] for answer in answers]


def _start(
    rank: int,
    world: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")
    torch.set_num_threads(1)
    values = function(*args, Path(folder, "0"))
    Path(folder, str(rank)).write_text("\n".join(str(value) for value in values))
    if dist.is_initialized():
        dist.destroy_process_group()


def _alone(setting: Setting, world: int, done: Path) -> Sequence[float]:
    """Measure an `Alone` of W processes; all but the first go on until that has."""
    first = os.environ["RANK"] == "0"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    share = setting.batch_size // world
    run = replace(setting, batch_size=share).run()
    run.wrapped.train()
    features = torch.randn(share, run.model.num_features)
    contender = ours(run, "fp32")
    with closing(contender.views()) as views:
        images = next(views)[0]
        take_gradients(run, (images, images))
        inputs = embeddings(setting.batch_size, setting.expander_dims[-1], CPU, torch.float32)

        def update() -> None:
            gradient_norms(run)
            gradients = [parameter.grad for parameter in run.model.parameters()]
            take_step(run)
            for parameter, gradient in zip(run.model.parameters(), gradients, strict=True):
                parameter.grad = gradient

        runs: dict[str, Callable[[], object]] = {
            "optimizer": update,
            "loss": forward_backward(our_loss, inputs),
            "views": lambda: next(views),
        }
        for name, module, x in (
            ("backbone", run.model.backbone, images),
            ("expander", run.model.expander, features.requires_grad_()),
        ):
            own = copy.deepcopy(module)  # of which `update` knows nothing
            if world > 1:
                SyncBatchNorm.convert(own)
            runs[name] = lambda own=own, x=x: _pass(own, x)
        while not first and not done.exists():
            _typical(runs, 1)
        return Alone(**_typical(runs, setting.steps)) if first else []


def _pass(module: nn.Module, x: Tensor) -> None:
    """Forward and backward of two views, as a step has them."""
    total = module(x).sum() + module(x).sum()
    torch.autograd.grad(total, [p for p in (*module.parameters(), x) if p.requires_grad])


def _loopback(gap: float, _: Path) -> Loopback:
    """Measure the network.

    Args:
        gap: seconds of arithmetic between two messages.
    """
    dist.init_process_group("gloo")
    one, many, square = torch.zeros(1), torch.zeros(2 * MIB), torch.randn(64, 64)
    product = _typical({"": lambda: square @ square}, 200)[""]
    products = round(gap / product)

    def train(send: Callable[[], object]) -> None:
        for _ in range(MESSAGES):
            for _ in range(products):
                square @ square  # pyright: ignore[reportUnusedExpression]
            send()

    took = _typical({"sent": lambda: train(lambda: sum_over_processes(one)),
                     "alone": lambda: train(lambda: None),
                     "gathered": lambda: gather_rows(many)}, 10)  # fmt: skip
    message = max((took["sent"] - took["alone"]) / MESSAGES, 1e-9)
    received = 4 * len(many) * (dist.get_world_size() - 1)
    return Loopback(message, received / max(took["gathered"] - message / 2, 1e-9))


def _step(setting: Setting, _: Path) -> list[float]:
    """Seconds of a step of training, views included; of a core that it took; and in all."""
    contender = ours(setting.run(), "fp32")
    with closing(contender.views()) as views:
        contender.step(*next(views))
        before = time.process_time()
        took = _typical({"": lambda: contender.step(*next(views))}, setting.steps)[""]
        of_step = (time.process_time() - before) / (setting.steps + WARM_UP)
        return [took, of_step, time.process_time()]


def _typical(alternatives: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, which take turns; the first `WARM_UP` rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats + WARM_UP):
        for name, run in alternatives.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    return {name: median(all_[WARM_UP:]) for name, all_ in times.items()}


def _write(setting: Setting) -> None:
    datasets.disable_progress_bars()
    side = setting.image_size
    pictures = photographs(min(256, setting.batch_size), side, side)
    cells = [pictures[k % len(pictures)] for k in range(2 * setting.batch_size)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(setting.images)
