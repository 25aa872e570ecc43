"""The commands of scripts/benchmark.py: their flags, and what each measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from vicreg_hf.benchmarks.checkpoints import checkpoints
from vicreg_hf.benchmarks.data import against_others, bottleneck
from vicreg_hf.benchmarks.features import extraction
from vicreg_hf.benchmarks.loss import one_process, several_processes
from vicreg_hf.benchmarks.measuring import surroundings
from vicreg_hf.benchmarks.scale import Machine, add_machine_flags, scale
from vicreg_hf.benchmarks.train import NAMES, training
from vicreg_hf.settings.command_line import parse_arguments


@dataclass
class Command:
    """One of them."""

    name: str
    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Sequence[str]], str]
    """From the flags, and the words that are none, to what is printed."""
    takes_more: bool = False
    """Whether further words are flags of pretrain.py."""


def _loss_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="instead, over so many processes on CPU"
    )
    _device_flag(parser)


def _loss(args: argparse.Namespace, _: Sequence[str]) -> str:
    device = torch.device("cpu" if args.processes else args.device)
    dtype = getattr(torch, args.dtype)
    if args.processes:
        table = several_processes(args.processes, args.rows, args.dims, dtype)
    else:
        table = one_process(args.rows, args.dims, device, dtype)
    return f"{surroundings(device)}\n{table}"


def _data(_: argparse.Namespace, others: Sequence[str]) -> str:
    return bottleneck(parse_arguments(others)) if others else against_others()


def _features_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--side", type=int, help="of square images; 500 x 375 without")
    _device_flag(parser)


def _features(args: argparse.Namespace, _: Sequence[str]) -> str:
    return extraction(
        args.architecture, args.device, num_images=args.num_images, batch_size=args.batch_size,
        side=args.side,
    )  # fmt: skip


def _checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--expander_dims", default="8192-8192-8192")
    parser.add_argument("--save_steps", type=int, default=500)
    _device_flag(parser)


def _checkpoint(args: argparse.Namespace, _: Sequence[str]) -> str:
    widths = [int(width) for width in args.expander_dims.split("-")]
    return checkpoints(
        args.architecture, args.device, batch_size=args.batch_size, image_size=args.image_size,
        expander_dims=widths, save_steps=args.save_steps,
    )  # fmt: skip


def _train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    parser.add_argument(
        "--channels_last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of the bare backbone; vicreg_hf always is, the authors and lightly never",
    )
    parser.add_argument("--steps", type=int, help="measured in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    _device_flag(parser)


def _train(args: argparse.Namespace, others: Sequence[str]) -> str:
    on_gpu = torch.device(args.device).type == "cuda"
    return training(
        others, precision=args.precision or ("bf16" if on_gpu else "fp32"), device=args.device,
        channels_last=args.channels_last, steps=args.steps or (50 if on_gpu else 8),
        rounds=args.rounds, only=args.only,
    )  # fmt: skip


def _scale_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=2048, help="global")
    parser.add_argument("--expander_dims", default="8192-8192-8192")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 32, 128, 512, 1024])
    parser.add_argument(
        "--weak", action="store_true", help="keep the images of each GPU, those of the first --gpus"
    )
    add_machine_flags(parser)


def _scale(args: argparse.Namespace, _: Sequence[str]) -> str:
    return scale(
        Machine(**{each.name: getattr(args, each.name) for each in fields(Machine)}),
        args.architecture, image_size=args.image_size, batch_size=args.batch_size,
        expander_dims=[int(width) for width in args.expander_dims.split("-")], gpus=args.gpus,
        weak=args.weak,
    )  # fmt: skip


def _device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


COMMANDS = {
    command.name: command
    for command in (
        Command("loss", "the loss against the authors' formula and lightly's", _loss_flags, _loss),
        Command(
            "data",
            "the views against the authors' pipeline; with flags of pretrain.py, such as --config "
            "or --dataset_name, the bottleneck of that run",
            lambda parser: None,  # noqa: ARG005
            _data,
            takes_more=True,
        ),
        Command("features", "extraction against the bare forward pass", _features_flags, _features),
        Command("checkpoint", "what saving adds to a run", _checkpoint_flags, _checkpoint),
        Command(
            "train",
            "training against the bare backbone, the authors' recipe and lightly's example; "
            "takes flags of pretrain.py, such as --architecture or --batch_size",
            _train_flags,
            _train,
            takes_more=True,
        ),
        Command(
            "scale",
            "step time on many GPUs, predicted from assumptions that are flags",
            _scale_flags,
            _scale,
        ),
    )
}
