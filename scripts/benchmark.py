"""Measure speed and memory, as ratios side by side in one run."""

import sys

import torch

from vicreg_hf.benchmarks.commands import COMMANDS
from vicreg_hf.runtime.machine import available_cores
from vicreg_hf.settings.command_line import script
from vicreg_hf.settings.parser import FlagsParser
from vicreg_hf.training.pretrain import ERRORS


def main() -> None:
    parser = FlagsParser(description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True)
    parser_of = {c.name: parsers.add_parser(c.name, help=c.help) for c in COMMANDS.values()}
    for command in COMMANDS.values():
        command.add_flags(parser_of[command.name])
    args, others = parser.parse_known_args(sys.argv[1:])
    command = COMMANDS[args.command]
    if others and not command.takes_more:
        parser_of[command.name].refuse(others)
    torch.set_num_threads(available_cores())
    print(command.measure(args, others))


if __name__ == "__main__":
    with script(*ERRORS):
        main()
