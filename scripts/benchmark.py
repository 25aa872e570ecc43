"""Measure speed and memory, as ratios side by side in one run."""

from __future__ import annotations

import argparse
import sys

import torch

from vicreg_hf.arguments import parse_arguments
from vicreg_hf.benchmarks.data import against_others, bottleneck
from vicreg_hf.benchmarks.features import extraction
from vicreg_hf.benchmarks.loss import one_process, several_processes
from vicreg_hf.benchmarks.measuring import surroundings
from vicreg_hf.data import available_cores


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the loss against the authors' formula and lightly's")
    loss.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    loss.add_argument("--dims", type=int, nargs="+", default=[2048, 8192, 16384])
    loss.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    loss.add_argument(
        "--processes", type=int, nargs="+", help="instead, over so many processes on CPU"
    )
    commands.add_parser(
        "data",
        help="the views against the authors' pipeline; with flags of pretrain.py, such as "
        "--config or --dataset_name, the bottleneck of that run",
    )
    features = commands.add_parser("features", help="extraction against the bare forward pass")
    features.add_argument("--architecture", default="resnet50")
    features.add_argument("--num_images", type=int, default=512)
    features.add_argument("--batch_size", type=int, default=64)
    features.add_argument("--side", type=int, help="of square images; 500 x 375 without")
    for command in (loss, features):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args, others = parser.parse_known_args(argv)
    if args.command == "data":
        print(bottleneck(parse_arguments(others)) if others else against_others())
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    torch.set_num_threads(available_cores())
    if args.command == "features":
        print(extraction(**{k: v for k, v in vars(args).items() if k != "command"}))
        return
    device = torch.device("cpu" if args.processes else args.device)
    dtype = getattr(torch, args.dtype)
    print(surroundings(device), flush=True)
    if args.processes:
        print(several_processes(args.processes, args.rows, args.dims, dtype))
    else:
        print(one_process(args.rows, args.dims, device, dtype))


if __name__ == "__main__":
    main(sys.argv[1:])
