"""The command lines of pretrain.py and evaluate.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.settings.evaluation import EvaluationArguments
from vicreg_hf.settings.parser import SettingsParser, at_home
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.settings.recipes import as_flags, describe_recipes, read_recipe, recipe_names

HEADINGS = {
    "dataset_name": "data", "architecture": "backbone and expander", "weights": "second branch",
    "sim_coeff": "loss", "image_size": "views", "batch_size": "optimisation",
    "num_workers": "speed", "output_dir": "output and resuming", "knn_steps": "monitoring",
    "push_to_hub": "Hub",
}  # fmt: skip
"""Over the settings in --help, each by the first that it stands above."""


class _ListRecipes(argparse.Action):
    """Print the recipes and be done, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_recipes())
        parser.exit()


def parse_arguments(argv: Sequence[str]) -> PretrainingArguments:
    """Settings from command-line words: a recipe first, flags on top.

    Without --config, `demo` data come with the recipe `demo`.

    Raises:
        ValueError: a setting that cannot be.
        SystemExit: words that are not flags, or --help.
    """
    argv = at_home(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--dataset_name", "--dataset-name", default=DEMO)
    first.add_argument("--replay")
    first.add_argument("--output_dir", "--output-dir")
    known, _ = first.parse_known_args(list(argv))
    config = known.config or (DEMO if known.dataset_name == DEMO else None)
    if known.replay is not None and known.config is None:
        config = str(Path(known.output_dir or "") / "config.yaml")
        if not Path(config).is_file():
            raise ValueError(f"replay needs the output_dir of a run, and there is no {config}.")
    parser = SettingsParser(
        PretrainingArguments,
        headings=HEADINGS,
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
        help="Instead of training, take a step of the run in output_dir again and describe it.",
    )
    words = [
        *(
            as_flags(read_recipe(config, PretrainingArguments, "scripts/pretrain.py"))
            if config
            else []
        ),
        *argv,
    ]
    namespace = vars(parser.parse_args(words))
    for name in ("config", "list_recipes", "preview", "replay"):
        namespace.pop(name)
    return PretrainingArguments(**namespace)


def parse_evaluation_arguments(argv: Sequence[str]) -> EvaluationArguments:
    """Settings from command-line words: a recipe first, flags on top.

    Raises:
        ValueError: a setting that cannot be.
        SystemExit: words that are not flags, or --help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    argv = at_home(argv)
    known, _ = first.parse_known_args(argv)
    names = ", ".join(recipe_names("evaluation"))
    parser = SettingsParser(
        EvaluationArguments, description="Measure an encoder on a labelled data set."
    )
    parser.add_argument(
        "--config",
        help=f"A recipe ({names}) or a YAML file; flags override it.",
    )
    recipe = {}
    if known.config:
        recipe = read_recipe(known.config, EvaluationArguments, "scripts/evaluate.py", "evaluation")
    words = [*as_flags(recipe), *argv]
    namespace = vars(parser.parse_args(words))
    namespace.pop("config")
    return EvaluationArguments(**namespace)
