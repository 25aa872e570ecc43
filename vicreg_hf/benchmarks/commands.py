"""The commands of scripts/benchmark.py: their flags, and what each measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from vicreg_hf.benchmarks.checkpoints import checkpoints
from vicreg_hf.benchmarks.data import views
from vicreg_hf.benchmarks.features import extraction
from vicreg_hf.benchmarks.loss import losses_compared
from vicreg_hf.benchmarks.scale import Machine, scale
from vicreg_hf.benchmarks.train import NAMES, training
from vicreg_hf.settings.parser import FlagsParser


def measure(words: Sequence[str], description: str | None = None) -> str:
    """What a command prints, from the words of its command line.

    Raises:
        SystemExit: words that are not flags, or --help.
    """
    parser = FlagsParser(description=description)
    _add_commands(parser.add_subparsers(dest="command", required=True))
    args, others = parser.parse_known_args(words)
    flags = vars(args)
    own, run, takes_more = (flags.pop(name) for name in ("own", "run", "takes_more"))
    if others and not takes_more:
        own.refuse(others)
    del flags["command"]
    return run(others, **flags) if takes_more else run(**flags)


def _add_commands(parsers: Any) -> None:
    def add(
        name: str, run: Callable[..., str], summary: str, *, takes_more: bool = False
    ) -> Callable[..., Any]:
        """Add a command, whose flags are arguments of what it runs; returns what adds a flag.

        Args:
            takes_more: whether further words, flags of pretrain.py, are the first argument.
        """
        own = parsers.add_parser(name, help=summary)
        own.set_defaults(own=own, run=run, takes_more=takes_more)
        return own.add_argument

    device = "cuda" if torch.cuda.is_available() else "cpu"
    several: Any = {"type": int, "nargs": "+"}

    flag = add("loss", losses_compared, "the loss against the authors' formula and lightly's")
    flag("--rows", default=[256, 1024, 2048, 4096], **several)
    flag("--dims", default=[2048, 8192, 16384], **several)
    flag("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    flag("--processes", help="instead, over so many processes on CPU", **several)
    flag("--device", default=device)

    summary = (
        "the views against the authors' pipeline; with flags of pretrain.py, such as --config or "
        "--dataset_name, the bottleneck of that run"
    )
    add("data", views, summary, takes_more=True)

    flag = add("features", extraction, "extraction against the bare forward pass")
    flag("--architecture", default="resnet50")
    flag("--num_images", type=int, default=512)
    flag("--batch_size", type=int, default=64)
    flag("--side", type=int, help="of square images; 500 x 375 without")
    flag("--device", default=device)

    flag = add("checkpoint", checkpoints, "what saving adds to a run")
    flag("--architecture", default="resnet50")
    flag("--batch_size", type=int, default=64)
    flag("--image_size", type=int, default=224)
    flag("--expander_dims", default="8192-8192-8192")
    flag("--save_steps", type=int, default=500)
    flag("--device", default=device)

    summary = (
        "training against the bare backbone, the authors' recipe and lightly's example; takes "
        "flags of pretrain.py, such as --architecture or --batch_size"
    )
    flag = add("train", training, summary, takes_more=True)
    flag("--only", nargs="+", choices=NAMES, default=NAMES)
    flag("--precision", choices=["fp32", "bf16", "fp16"])
    layout = "of the bare backbone; vicreg_hf always is, the authors and lightly never"
    flag("--channels_last", action=argparse.BooleanOptionalAction, default=True, help=layout)
    flag("--steps", type=int, help="measured in a turn")
    flag("--rounds", type=int, default=5)
    flag("--device", default=device)

    flag = add("scale", _scale, "step time on many GPUs, predicted from assumptions that are flags")
    flag("--architecture", default="resnet50")
    flag("--image_size", type=int, default=224)
    flag("--batch_size", type=int, default=2048, help="global")
    flag("--expander_dims", default="8192-8192-8192")
    flag("--gpus", default=[1, 8, 32, 128, 512, 1024], **several)
    kept = "keep the images of each GPU, those of the first --gpus"
    flag("--weak", action="store_true", help=kept)
    for each in fields(Machine):
        unit, source = each.metadata["unit"], each.metadata["source"]
        text = f"{unit} (default {each.default}: {source})".replace("%", "%%")
        flag(f"--{each.name}", default=each.default, type=type(each.default), help=text)


def _scale(**flags: Any) -> str:
    machine = Machine(**{each.name: flags.pop(each.name) for each in fields(Machine)})
    return scale(machine, **flags)
