"""The command lines of pretrain.py and evaluate.py, and how scripts end."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vicreg_hf.data.opening import DEMO
from vicreg_hf.hub.api import without_tokens
from vicreg_hf.runtime.console import outlive_readers
from vicreg_hf.settings.evaluation import EvaluationArguments
from vicreg_hf.settings.parser import FlagsParser, SettingsParser, expand_home
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.settings.recipes import describe_recipes, recipe_names


@contextmanager
def script(*errors: type[BaseException]) -> Iterator[None]:
    """Run a script: errors of these kinds end it with a sentence and status 1.

    Output that nobody reads any more ends nothing.
    """
    gc.freeze()  # what is imported is no garbage, and is not looked through again
    outlive_readers()
    try:
        yield
    except errors as error:
        sys.exit(f"error: {without_tokens(str(error))}")


class _ListRecipes(argparse.Action):
    """Print the recipes and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_recipes())
        parser.exit()


def parse_arguments(argv: Sequence[str]) -> PretrainingArguments:
    """Settings of a pretraining run from command-line words: a recipe first, flags on top.

    Without --config, `demo` data come with the recipe `demo`.

    Raises:
        ValueError: a setting that cannot be.
        SystemExit: words that are not flags, or --help.
    """
    parser = SettingsParser(
        PretrainingArguments,
        description="Pretrain a timm backbone with VICReg on images without labels.",
    )
    parser.add_argument(
        "--config",
        help=f"A recipe ({', '.join(recipe_names())}) or a YAML file; flags override it.",
    )
    parser.add_argument(
        "--list_recipes",
        action=_ListRecipes,
        nargs=0,
        usual=False,
        help="Print the recipes: data, hardware, expected accuracy and its source.",
    )
    parser.add_argument(
        "--preview",
        metavar="PNG",
        help="Instead of training, draw images beside their two views in this file.",
    )
    parser.add_argument(
        "--replay",
        metavar="STEP",
        type=int,
        usual=False,
        help="Instead of training, take a step of the run in output_dir again and describe it.",
    )
    known = early(argv, "config", "replay", "dataset_name", "output_dir")
    recipe = known.config
    if recipe is None and known.replay is not None:
        recipe = str(Path(known.output_dir or "") / "config.yaml")
        if not Path(recipe).is_file():
            raise ValueError(f"replay needs the output_dir of a run, and there is no {recipe}.")
    if recipe is None and known.dataset_name in (None, DEMO):
        recipe = DEMO
    return parser.read(argv, recipe)


def parse_evaluation_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """Settings of an evaluation from command-line words: a recipe first, flags on top.

    Raises:
        ValueError: a setting that cannot be.
        SystemExit: words that are not flags, or --help.
    """
    names = ", ".join(recipe_names(EvaluationArguments.recipe_folder))
    parser = SettingsParser(
        EvaluationArguments, description="Measure an encoder on a labelled data set."
    )
    parser.add_argument("--config", help=f"A recipe ({names}) or a YAML file; flags override it.")
    return parser.read(argv, early(argv, "config").config)


def early(argv: Sequence[str], *names: str) -> argparse.Namespace:
    """The values of a few flags, from which it follows how the others are read."""
    parser = FlagsParser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(expand_home(argv))[0]
