"""The installed command `vicreg-hf`: finds the module of the command that is named, and starts it.

Each module can also be started by itself, which a launcher of several processes needs:
`accelerate launch -m vicreg_hf.commands.pretrain`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

PROGRAM = "vicreg-hf"
COMMANDS = {
    "pretrain": "train an encoder on images without labels",
    "evaluate": "measure any encoder on a labelled data set",
    "extract": "write the features of a data set as parquet",
    "search": "find the images whose features are nearest to those of a new one",
    "publish": "push what a run has made to the Hub",
    "convert": "make an encoder of a checkpoint of the authors, lightly or solo-learn",
    "export": "write the encoder of a run or a checkpoint to a directory, also as ONNX",
    "recipes": "list the recipes, or print one",
}
"""What each command does; its module has the command's name."""
FORMER = {"extract_features": "extract", "convert_checkpoint": "convert"}
"""Commands by the names of the scripts, where these differ."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its flags; by default those of this process.

    Raises:
        SystemExit: no such command (2), or as the command ends.
    """
    first, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("--help", "-h", "help"):
        print(_overview())
    elif first in ("--version", "-V"):
        print(f"{PROGRAM} {import_module('vicreg_hf').__version__}")
    elif first in COMMANDS:
        sys.argv[0] = f"{PROGRAM} {first}"  # by which its --help calls it
        import_module(f"vicreg_hf.commands.{first}").main(words)
    else:
        print(f"error: {_no_command(first)}", file=sys.stderr)
        sys.exit(2)


def _overview() -> str:
    lines = [f"  {name:10}{does}" for name, does in COMMANDS.items()]
    return "\n".join([
        f"usage: {PROGRAM} COMMAND [--SETTING VALUE ...]", "", "commands:", *lines, "",
        f"{PROGRAM} COMMAND --help lists the settings of one, {PROGRAM} --version the version.",
    ])  # fmt: skip


def _no_command(word: str) -> str:
    if word.startswith("-"):
        return f"a command must come before its settings, got {word}; {PROGRAM} lists the commands."
    near = [FORMER[bare]] if (bare := word.removesuffix(".py").replace("-", "_")) in FORMER else []
    near += difflib.get_close_matches(word, COMMANDS, n=2, cutoff=0.5)
    meant = f", {' or '.join(dict.fromkeys(near))} is one" if near else ""
    return f"{word} is no command{meant}; {PROGRAM} lists the commands."


if __name__ == "__main__":
    main()
