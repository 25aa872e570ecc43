"""Named settings: recipes shipped with the package, and YAML files of one's own."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

ABOUT = "about"
"""What a recipe says of itself, beside its settings."""
FACTS = ("data", "hardware", "expected", "source")
"""Which images it is for, what it is meant to run on, which accuracy to expect, who says so."""


def recipe_names(folder: str = "") -> list[str]:
    """Names of the recipes in a folder of `vicreg_hf/recipes`, by default those of pretraining."""
    return sorted(
        f.name.removesuffix(".yaml") for f in _place(folder).iterdir() if f.name[-5:] == ".yaml"
    )


def read_recipe(
    name_or_path: str, settings_of: type, script: str, folder: str = ""
) -> dict[str, Any]:
    """Settings of a shipped recipe or a YAML file.

    Args:
        settings_of: dataclass whose fields there are.
        script: whose settings they are, for the error.
        folder: of `vicreg_hf/recipes`, in which shipped recipes are looked for.

    Raises:
        ValueError: no such recipe or file, not a mapping, or settings that do not exist.
    """
    settings = _content(name_or_path, folder)
    settings.pop(ABOUT, None)
    unknown = {str(name) for name in settings} - {f.name for f in fields(settings_of)}
    if unknown:
        raise ValueError(
            f"config must hold settings of {script}, got {', '.join(sorted(unknown))} "
            f"in {name_or_path}; --help lists them."
        )
    return settings


def read_about(name: str) -> dict[str, str]:
    """What a shipped recipe says of itself, by the names in `FACTS`."""
    about = _content(name, "").get(ABOUT) or {}
    return {fact: " ".join(str(about.get(fact, "")).split()) for fact in FACTS}


def _place(folder: str) -> Traversable:
    return resources.files("vicreg_hf") / "recipes" / folder


def _content(name_or_path: str, folder: str) -> dict[str, Any]:
    names = recipe_names(folder)
    if name_or_path in names:
        text = (_place(folder) / f"{name_or_path}.yaml").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"config must be a recipe ({', '.join(names)}) or a YAML file, got {name_or_path!r}."
        )
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config must be valid YAML, {name_or_path} is not: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config must map settings to values, got {settings!r} in {name_or_path}.")
    return settings


def describe_recipes() -> str:
    """Every shipped recipe with what it says of itself, for people to read."""
    parts = []
    for name in recipe_names():
        about = read_about(name)
        parts.append("\n".join([name, *(f"    {fact:9} {about[fact]}" for fact in FACTS)]))
    return "\n\n".join(parts)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line words, so that YAML and shell pass through one parser."""
    words = []
    for name, value in settings.items():
        if value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            if isinstance(value, (list, tuple)):  # widths of an expander
                text = "-".join(map(str, value))
            words.append(f"--{name}={text}")
    return words
