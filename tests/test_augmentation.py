"""Recipes of one's own, and what cannot be one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vicreg_hf.arguments import PretrainingArguments, parse_arguments
from vicreg_hf.augmentation import PRESETS, ViewRecipe, describe, find_recipes
from vicreg_hf.views import TwoViews

OWN = """
preset: paper
flip: 0          # letters
scale: [0.5, 1]
x_prime:
  blur: 0.25
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "letters.yaml"
    path.write_text(OWN)
    return path


def test_a_file_changes_a_preset_for_both_views_or_one(own: Path) -> None:
    base = PRESETS["paper"][0]
    both = replace(base, flip=0, scale=(0.5, 1.0))
    assert find_recipes(str(own)) == (both, replace(both, blur=0.25))
    assert TwoViews(32, str(own)).recipes == find_recipes(str(own))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_description_is_the_recipes_again(preset: str) -> None:
    described = yaml.safe_load(yaml.safe_dump(describe(PRESETS[preset])))
    assert find_recipes(described) == PRESETS[preset]


def test_config_yaml_holds_what_the_file_said_and_not_where_it_was(own: Path) -> None:
    args = parse_arguments(["--augmentation", str(own)])
    recipes = find_recipes(str(own))
    own.unlink()
    again = PretrainingArguments(**yaml.safe_load(args.to_yaml()))
    assert again.augmentation == args.augmentation
    assert find_recipes(again.augmentation or "") == recipes


def test_config_yaml_of_such_a_run_is_a_config(own: Path, tmp_path: Path) -> None:
    args = parse_arguments(["--augmentation", str(own)])
    (tmp_path / "config.yaml").write_text(args.to_yaml())
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]) == args


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", r"must map fields to values, got \[1\]"),
        ("x: 3", "x and x_prime must map fields to values, got 3"),
        ("flip: [", "must be valid YAML"),
        ("fliip: 1", r"fields of a view \(blur, .*\), got fliip"),
        ("preset: strong", "preset must be one of authors, .* got 'strong'"),
        ("flip: 1.5", "flip must be a number between 0 and 1, got 1.5"),
        ("flip: true", "flip must be a number between 0 and 1, got True"),
        ("hue: 0.6", "hue must be a number between 0 and 0.5, got 0.6"),
        ("contrast: -1", "contrast must be a number at least 0, got -1"),
        ("contrast: .inf", "contrast must be a number at least 0, got inf"),
        ("scale: 0.5", "scale must be two positive numbers, the lesser first, got 0.5"),
        ("scale: [1, 0.5]", r"scale must be two positive numbers, the lesser first, got \[1, 0.5"),
        ("blur_sigma: [0, 2]", "blur_sigma must be two positive numbers"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "views.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        find_recipes(str(path))


@pytest.mark.parametrize(
    "change", [{"flip": 2}, {"ratio": (2.0, 1.0)}, {"brightness": "much"}, {"blur": None}]
)
def test_a_recipe_in_python_is_held_to_the_same(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ViewRecipe(**change)
