"""Training from images to changed weights, as a share of what the bare backbone would do alone.

Shapes: B images, C channels, S side of a view.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from accelerate.utils import patch_environment
from torch import Tensor

from vicreg_hf.benchmarks.contenders import Contender, Pair, authors, bare, lightly, ours
from vicreg_hf.benchmarks.data import MADE, made_images
from vicreg_hf.benchmarks.measuring import MIB, peak_extra_mib, seconds_of, surroundings, table
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.setup import setup

DEFAULTS = ("--architecture=resnet18", "--image_size=32", "--expander_dims=2048-2048-2048")
NAMES = ("bare", "vicreg_hf", "authors", "lightly")
"""Choices of --only, in the order of the table."""
LABELS = {"bare": "bare backbone"}
WARM_UP = 3
"""Steps of a turn that are not measured, at least."""
ACCELERATE = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def training(
    flags: Sequence[str],
    *,
    precision: str | None,
    device: str,
    channels_last: bool,
    steps: int | None,
    rounds: int,
    only: Sequence[str] = NAMES,
) -> str:
    """A table of ways to train, which take turns.

    Each turn begins with nothing prepared and takes steps that are not measured first: at least
    `WARM_UP`, and as many as there are loading workers.

    Args:
        flags: of pretrain.py, over `DEFAULTS`.
        precision: fp32, bf16 or fp16, by default bf16 on CUDA and fp32 elsewhere; the authors' own
            is fp16 on CUDA whatever this is.
        channels_last: layout of the bare backbone; vicreg_hf always has it, the others never.
        steps: measured in a turn, by default 50 on CUDA and 8 elsewhere; rounded up to a multiple
            of the loading workers.
        rounds: turns of each; the median counts.
        only: what is measured, of `NAMES`.

    Raises:
        ValueError: flags that name data: the images are made, and have no labels to probe.
    """
    if any(word.startswith("--dataset_name") for word in flags):
        raise ValueError("train makes its own images, got --dataset_name; leave it out.")
    defaults = () if any(word.startswith("--config") for word in flags) else DEFAULTS
    args = parse_arguments([*defaults, *flags, f"--dataset_name={MADE}"])
    kind = torch.device(device).type
    on_gpu = kind == "cuda"
    precision, steps = precision or ("bf16" if on_gpu else "fp32"), steps or (50 if on_gpu else 8)
    # as `accelerate launch` would with these
    launched = patch_environment(
        ACCELERATE_MIXED_PRECISION=ACCELERATE[precision], ACCELERATE_USE_CPU=kind == "cpu"
    )
    with made_images(args) as (made, pictures), launched:
        run = setup(made)
        on = run.accelerator.device
        builders = {
            "bare": lambda: bare(run, precision, channels_last),
            "vicreg_hf": lambda: ours(run, precision),
            "authors": lambda: authors(run, pictures),
            "lightly": lambda: lightly(run, pictures, precision),
        }
        contenders = {name: builders[name]() for name in NAMES if name in only}
        _take_turns(contenders, steps, rounds, on)
    shape = f"{args.architecture}, {args.batch_size} images of {run.views.image_sizes[0]} pixels"
    origin = "in memory" if isinstance(run.inputs.images, Tensor) else "from JPEGs of 500 x 375"
    compiled = "compiled" if run.model.branches_compiled else "not compiled"
    layout = "channels last" if channels_last else "channels first"
    settings = (
        f"{shape} {origin}, views {run.args.augmentation}, expander {args.expander_dims}; "
        f"vicreg_hf: {args.optimizer}; bare backbone: {layout}; both {compiled}; "
        f"{run.args.num_workers} loading "
        f"workers; medians of {rounds} rounds of {steps} steps"
    )
    rows = _rows(contenders, 2 * args.batch_size, on)
    return f"{surroundings(on)}\n{settings}\n{rows}"


# Measuring
def _take_turns(
    contenders: dict[str, Contender | None], steps: int, rounds: int, device: torch.device
) -> None:
    """Measure each in turn, and say on stderr what each turn took."""
    there = {name: each for name, each in contenders.items() if each is not None}
    for contender in there.values():  # compiles, tunes and allocates
        _turn(contender, 1, device)
        contender.peak = 0.0
    for _, (name, contender) in itertools.product(range(rounds), there.items()):
        contender.seconds.append(_turn(contender, steps, device))
        took = 1000 * contender.seconds[-1]
        print(f"{name}: {took:.2f} ms a step", file=sys.stderr, flush=True)


def _turn(contender: Contender, steps: int, device: torch.device) -> float:
    """Seconds a step."""
    torch.backends.cudnn.benchmark = contender.autotune
    count = -(-steps // contender.workers) * contender.workers
    took: list[float] = []

    def take() -> None:
        with closing(contender.views()) as views:
            _take(contender, views, max(WARM_UP, contender.workers))
            took.append(seconds_of(lambda: _take(contender, views, count), device) / count)

    extra = peak_extra_mib(take, device) or 0.0
    contender.peak = max(contender.peak, _held_mib(contender) + extra)
    return took[0]


def _take(contender: Contender, views: Iterator[Pair], count: int) -> None:
    for x, x_prime in itertools.islice(views, count):
        contender.step(x, x_prime)


def _held_mib(contender: Contender) -> float:
    """Memory of the weights and the optimiser's state, which lie there between turns."""
    state = contender.optimizer.state.values() if contender.optimizer is not None else ()
    moments = [value for entries in state for value in entries.values()]
    tensors = [*contender.model.parameters(), *contender.model.buffers(), *moments]
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor)) / MIB


def _rows(
    contenders: dict[str, Contender | None], views_per_step: int, device: torch.device
) -> str:
    seconds = {n: statistics.median(c.seconds) for n, c in contenders.items() if c is not None}
    on_gpu = device.type == "cuda"
    lines = []
    for name, contender in contenders.items():
        label = LABELS.get(name, name)
        if contender is None:
            lines.append([label, "not installed", *["-"] * (4 + on_gpu)])
            continue
        took = seconds[name]
        bare, authors = (seconds.get(other) for other in ("bare", "authors"))
        line = [label, contender.precision, f"{1000 * took:.2f}", f"{views_per_step / took:.0f}"]
        line.append("-" if bare is None else f"{100 * bare / took:.1f} %")
        line.append("-" if authors is None else f"{authors / took:.2f}")
        lines.append([*line, *([f"{contender.peak:.0f}"] if on_gpu else [])])
    header = ["", "precision", "ms a step", "views/s", "share of the bare backbone"]
    return table([*header, "authors / this", *(["peak MiB"] if on_gpu else [])], lines)
