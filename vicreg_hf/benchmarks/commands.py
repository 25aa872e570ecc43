"""The commands of scripts/benchmark.py: their flags, and what each measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vicreg_hf.benchmarks.checkpoints import checkpoints
from vicreg_hf.benchmarks.data import views
from vicreg_hf.benchmarks.features import extraction
from vicreg_hf.benchmarks.gpu import PARTS, gpu
from vicreg_hf.benchmarks.loss import losses_compared
from vicreg_hf.benchmarks.scale import scale
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
    if flags.get("device", "") is None:  # only now, as `gpu` and `scale` leave it to others
        flags["device"] = "cuda" if torch.cuda.is_available() else "cpu"
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

    device: Any = {"help": "torch's name of it; cuda where there is a GPU"}
    several: Any = {"type": int, "nargs": "+"}

    flag = add("loss", losses_compared, "the loss against the authors' formula and lightly's")
    flag("--rows", default=[256, 1024, 2048, 4096], **several)
    flag("--dims", default=[2048, 8192, 16384], **several)
    flag("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    flag("--processes", help="instead, over so many processes on CPU", **several)
    flag("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it too")
    flag("--device", **device)

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
    flag("--device", **device)

    flag = add("checkpoint", checkpoints, "what saving adds to a run")
    flag("--architecture", default="resnet50")
    flag("--batch_size", type=int, default=64)
    flag("--image_size", type=int, default=224)
    flag("--expander_dims", default="8192-8192-8192")
    flag("--save_steps", type=int, default=500)
    flag("--rounds", type=int, default=4, help="of which the first is not counted")
    flag("--device", **device)

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
    flag("--device", **device)

    summary = (
        "training on 1 process and on several of this machine, which share the batch; takes flags "
        "of pretrain.py"
    )
    flag = add("scale", scale, summary, takes_more=True)
    flag("--processes", default=[1, 2], **several)
    flag("--steps", type=int, default=20, help="measured in a round")
    flag("--rounds", type=int, default=3)

    summary = "all checks and measurements of one GPU; what it has found is written at once"
    flag = add("gpu", partial(gpu, measure), summary)
    flag("--minutes", type=float, default=9.0, help="for everything together")
    flag("--output_dir", default="runs/gpu", help="for results.md, results.json and log.txt")
    flag("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    flag("--rehearse", action="store_true", help="on the CPU at tiny size, without a GPU")
