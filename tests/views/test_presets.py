"""Recipes of one's own, and what cannot be one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.views.presets import (
    PRESETS,
    Recipes,
    find_recipes,
    local_recipe,
    multi_crop_recipes,
)
from vicreg_hf.views.two_views import TwoViews

OWN = """
preset: paper
flip: 0          # letters
scale: [0.5, 1]
x_prime:
  blur: 0.25
"""
EVERYTHING = (
    "{preset: cifar, hue: 0.5, x: {scale: [0.3, 0.9]}, x_prime: {blur_sigma: [1, 2]}, local: {}}"
)
LOCAL = OWN + "local: {scale: [0.1, 0.3], blur: 0.75}\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "letters.yaml"
    path.write_text(OWN)
    return path


def test_a_file_changes_a_preset_for_all_views_or_one(own: Path) -> None:
    both = replace(PRESETS["paper"].x, flip=0, scale=(0.5, 1.0))
    assert find_recipes(str(own)) == (both, replace(both, blur=0.25), local_recipe(both))
    assert TwoViews(32, str(own)).recipes == find_recipes(str(own))[:2]
    local = find_recipes(yaml.safe_load(LOCAL)).local
    assert local == replace(both, scale=(0.1, 0.3), blur=0.75)
    # local views change on top of what x has become, and end where global ones start
    sharp = find_recipes({"x": {"flip": 0.25, "scale": [0.28, 1]}, "blur": 0})
    assert sharp.local == replace(sharp.x, scale=(0.1, 0.28))
    assert find_recipes({"local": None}) == PRESETS["authors"]
    assert PRESETS["authors"].local.scale == (0.05, 0.14)  # SwAV's own
    assert PRESETS["cifar"].local.scale == (0.0714, 0.2)


def test_global_views_take_turns_and_local_ones_follow() -> None:
    x, x_prime, local = find_recipes(yaml.safe_load(LOCAL))
    assert len({x, x_prime, local}) == 3
    assert multi_crop_recipes(yaml.safe_load(LOCAL)) == (x, x_prime)
    made = multi_crop_recipes(Recipes(x, x_prime, local), num_global_views=3, num_local_views=2)
    assert made == (x, x_prime, x, local, local)
    assert multi_crop_recipes("cifar", num_local_views=1) == PRESETS["cifar"]
    with pytest.raises(ValueError, match="num_global_views must be at least 1, got 0"):
        multi_crop_recipes("cifar", num_global_views=0)


@pytest.mark.parametrize("content", [OWN, LOCAL, EVERYTHING])
def test_config_yaml_holds_what_the_file_said_and_not_where_it_was(own: Path, content: str) -> None:
    own.write_text(content)
    args = parse_arguments(["--augmentation", str(own)])
    recipes = find_recipes(str(own))
    own.unlink()
    again = PretrainingArguments(**yaml.safe_load(args.to_yaml()))
    assert again.augmentation == args.augmentation
    config = own.with_name("config.yaml")
    config.write_text(args.to_yaml())
    assert parse_arguments(["--config", str(config)]) == args
    assert find_recipes(again.augmentation or "") == recipes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", r"must map fields to values, got \[1\]"),
        ("local: {preset: cifar}", r"and fields of a view \(blur, .*\), got preset"),
        ("flip: [", "must be valid YAML"),
        ("preset: strong", "preset must be one of authors, .* got 'strong'"),
        ("flip: true", "flip must be a number between 0 and 1, got True"),
        ("contrast: .inf", "contrast must be a number at least 0, got inf"),
        ("scale: [1, 0.5]", r"scale must be two positive numbers, the lesser first, got \[1, 0.5"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(content: str, message: str, own: Path) -> None:
    own.write_text(content)
    with pytest.raises(ValueError, match=message):
        find_recipes(str(own))
