"""Recipes: named settings that are shipped with the package, and YAML files of users."""

from __future__ import annotations

import difflib
import json
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vicreg_hf.settings.base import Settings

ABOUT = "about"
"""The part of a recipe that describes it, beside its settings."""
FACTS = ("data", "hardware", "expected", "source")
"""The images and the machine it is for, the accuracy to expect, and who measured that."""


def recipe_names(folder: str = "") -> list[str]:
    """Names of the recipes in a folder of `vicreg_hf/recipes`, by default those of pretraining."""
    files = (resources.files("vicreg_hf") / "recipes" / folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def read_recipe(name_or_path: str, kind: type[Settings]) -> dict[str, Any]:
    """The settings in a shipped recipe or a YAML file.

    Args:
        kind: the class whose fields may be set.

    Raises:
        ValueError: no such recipe or file, not a mapping, or settings that do not exist.
    """
    settings = _content(name_or_path, kind.recipe_folder)
    settings.pop(ABOUT, None)
    unknown = {str(name) for name in settings} - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(
            f"config must hold settings of {kind.command}, got {', '.join(sorted(unknown))} "
            f"in {name_or_path}; --help all lists them."
        )
    return settings


def read_about(name: str) -> dict[str, str]:
    """The description of a shipped recipe, by the names in `FACTS`."""
    about = _content(name, "").get(ABOUT) or {}
    return {fact: " ".join(str(about.get(fact, "")).split()) for fact in FACTS}


def recipe_text(name: str, *folders: str) -> str:
    """The YAML of a shipped recipe, as it is in the first of some folders that has it.

    Raises:
        ValueError: none has it.
    """
    for folder in folders:
        if name in recipe_names(folder):
            path = resources.files("vicreg_hf") / "recipes" / folder / f"{name}.yaml"
            return path.read_text(encoding="utf-8")
    names = [name for folder in folders for name in recipe_names(folder)]
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"; {near[0]} is one" if near else ""
    raise ValueError(f"a recipe must be one of {', '.join(names)}, got {name!r}{meant}.")


def _content(name_or_path: str, folder: str) -> dict[str, Any]:
    path: Any = Path(name_or_path)
    if name_or_path in (names := recipe_names(folder)):
        path = resources.files("vicreg_hf") / "recipes" / folder / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise ValueError(
            f"config must be a recipe ({', '.join(names)}) or a YAML file, got {name_or_path!r}."
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config must be valid YAML, {name_or_path} is not: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config must map settings to values, got {settings!r} in {name_or_path}.")
    return settings


def describe_recipes() -> str:
    """Every shipped recipe with its description, for --list_recipes."""
    parts = []
    for name in recipe_names():
        about = read_about(name)
        parts.append("\n".join([name, *(f"    {fact:9} {about[fact]}" for fact in FACTS)]))
    return "\n\n".join(parts)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line words, so that YAML and shell pass through one parser."""
    words = []
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):  # names, or widths of an expander
            value = ("," if any(isinstance(v, str) for v in value) else "-").join(map(str, value))
        if value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
