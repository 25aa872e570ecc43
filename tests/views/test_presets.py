"""Recipes of one's own, and what cannot be one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vicreg_hf.runtime.randomness import uniforms
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.views.draws import NUM_UNIFORMS, draw_crops
from vicreg_hf.views.presets import (
    PRESETS,
    Recipes,
    ViewRecipe,
    describe,
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
LOCAL = OWN + "local: {scale: [0.1, 0.3], blur: 0.75}\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "letters.yaml"
    path.write_text(OWN)
    return path


def test_a_file_changes_a_preset_for_both_views_or_one(own: Path) -> None:
    base = PRESETS["paper"][0]
    both = replace(base, flip=0, scale=(0.5, 1.0))
    assert find_recipes(str(own)) == (both, replace(both, blur=0.25), local_recipe(both))
    assert TwoViews(32, str(own)).recipes == find_recipes(str(own))[:2]


def test_a_file_changes_local_views_on_top_of_what_x_has_become() -> None:
    x, _, local = find_recipes(yaml.safe_load(LOCAL))
    assert local == replace(x, scale=(0.1, 0.3), blur=0.75)
    sharp = find_recipes({"x": {"flip": 0.25, "scale": [0.28, 1]}, "blur": 0})
    assert sharp.local == replace(sharp.x, scale=(0.1, 0.28))
    assert (sharp.local.flip, sharp.local.blur) == (0.25, 0)
    assert find_recipes({"local": None}) == PRESETS["authors"]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("authors", (0.05, 0.14)),  # SwAV's own
        ("paper", (0.05, 0.14)),
        ("cifar", (0.0714, 0.2)),
        ("tiny", (0.1429, 0.4)),
        ("demo", (0.1071, 0.3)),
        ("audio", (0.2143, 0.6)),
    ],
)
def test_local_crops_are_swavs_or_end_where_global_ones_start(
    preset: str, expected: tuple[float, float]
) -> None:
    assert PRESETS[preset].local == replace(PRESETS[preset].x, scale=expected)


def test_global_views_take_turns_and_local_ones_follow() -> None:
    x, x_prime, local = find_recipes(yaml.safe_load(LOCAL))
    assert len({x, x_prime, local}) == 3
    assert multi_crop_recipes(yaml.safe_load(LOCAL)) == (x, x_prime)
    made = multi_crop_recipes(Recipes(x, x_prime, local), num_global_views=3, num_local_views=2)
    assert made == (x, x_prime, x, local, local)
    assert multi_crop_recipes("cifar", num_local_views=1) == PRESETS["cifar"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"num_global_views": 0}, "num_global_views must be at least 1, got 0"),
        ({"num_local_views": -1}, "num_local_views must be at least 0, got -1"),
    ],
)
def test_views_of_impossible_number_are_refused(counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_crop_recipes("authors", **counts)


def test_a_preset_that_is_not_there_is_called_as_the_caller_calls_it() -> None:
    with pytest.raises(ValueError, match=r"^preset must be one of authors, .* got 'strong'"):
        multi_crop_recipes("strong")
    with pytest.raises(ValueError, match=r"^augmentation must be one of authors, .* got 'strong'"):
        find_recipes("strong")


@pytest.mark.parametrize(
    ("given", "received"),
    [(ViewRecipe(), "a single ViewRecipe; give a recipe"), (3, "3"), ([], r"\[")],
)
def test_recipes_are_found_by_a_name_or_in_a_mapping(given: Any, received: str) -> None:
    with pytest.raises(ValueError, match=f"a YAML file or its content, got {received}"):
        find_recipes(given)


@pytest.mark.parametrize(
    ("height", "width"),
    [(128, 128), (64, 96), (128, 431), (128, 1000)],  # square; one, five and ten seconds
)
def test_audio_crops_differ_in_place_and_shape_for_clips_of_any_length(
    height: int, width: int
) -> None:
    u = uniforms(np.arange(2000), NUM_UNIFORMS, seed=0, stream=0)
    top, left, h, w = draw_crops(u, height, width, PRESETS["audio"].x).T
    whole = (h == height) & (w == width)
    assert whole.mean() < 0.5  # the others are cut, in frequency, time or both
    for start, length, room in ((top, h, height), (left, w, width)):
        assert length.min() >= 0.58 * room
        assert len(np.unique(length)) > 10
        assert len(np.unique(start)) > 10


PROBABILITIES = st.floats(0, 1)
RANGES = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda ends: tuple(sorted(ends)))
VIEW_RECIPES = st.builds(
    ViewRecipe, scale=RANGES, ratio=RANGES, flip=PROBABILITIES, jitter=PROBABILITIES,
    brightness=PROBABILITIES, hue=st.floats(0, 0.5), blur=PROBABILITIES, blur_sigma=RANGES,
)  # fmt: skip
CHANGES = st.fixed_dictionaries(
    {}, optional={"flip": PROBABILITIES, "scale": RANGES.map(list), "hue": st.floats(0, 0.5)}
)


@given(st.builds(Recipes, VIEW_RECIPES, VIEW_RECIPES, VIEW_RECIPES))
@settings(deadline=None)
def test_any_recipes_survive_their_description(recipes: Recipes) -> None:
    described = yaml.safe_load(yaml.safe_dump(describe(recipes)))
    assert find_recipes(described) == recipes


@given(
    st.sampled_from([*PRESETS]),
    CHANGES,
    st.fixed_dictionaries({}, optional=dict.fromkeys(("x", "x_prime", "local"), CHANGES)),
)
@settings(deadline=None)
def test_what_a_file_says_survives_its_description(
    preset: str, common: dict[str, Any], own: dict[str, Any]
) -> None:
    recipes = find_recipes({"preset": preset, **common, **own})
    assert find_recipes(describe(recipes)) == recipes


def test_a_description_without_local_changes_is_what_it_always_was() -> None:
    assert describe(find_recipes({"flip": 0})).keys() == {"x", "x_prime"}
    assert describe(find_recipes(yaml.safe_load(LOCAL)))["local"]["scale"] == [0.1, 0.3]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_description_is_the_recipes_again(preset: str) -> None:
    described = yaml.safe_load(yaml.safe_dump(describe(PRESETS[preset])))
    assert find_recipes(described) == PRESETS[preset]


@pytest.mark.parametrize("content", [OWN, LOCAL])
def test_config_yaml_holds_what_the_file_said_and_not_where_it_was(own: Path, content: str) -> None:
    own.write_text(content)
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
        ("x: 3", "x, x_prime and local must map fields to values, got 3"),
        ("local: [0.05, 0.14]", r"x_prime and local must map fields to values, got \[0.05, 0.14"),
        ("local: {preset: cifar}", r"and fields of a view \(blur, .*\), got preset"),
        ("local: {scale: 0.1}", "scale must be two positive numbers, the lesser first, got 0.1"),
        ("local: {blur: 2}", "blur must be a number between 0 and 1, got 2"),
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
