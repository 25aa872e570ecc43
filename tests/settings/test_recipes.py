"""Every shipped recipe: listed, complete, built at its full width, and stepped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from workflow import write_images

from vicreg_hf import PretrainingArguments, VICRegConfig, VICRegModel
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.settings.command_line import parse_arguments, parse_evaluation_arguments
from vicreg_hf.settings.recipes import FACTS, read_about, read_recipe, recipe_names
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients, take_step, views_from_here
from vicreg_hf.views.presets import PRESETS, describe, find_recipes

WANTED = {
    "imagenet-r50-100ep", "imagenet-r50-1000ep", "imagenet-r50x2", "imagenet100-r18",
    "cifar10-r18", "cifar100-r18", "imagenette-r18", "vit-small-224", "small-data",
    "small-data-cpu", "tiny-cpu", "demo",
}  # fmt: skip
EVALUATION = {"linear-authors", "paper", "segmentation", "semi-supervised-authors"}


def test_the_recipes_wanted_are_there_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(recipe_names()) >= WANTED
    assert set(recipe_names("evaluation")) == EVALUATION
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--list_recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == recipe_names()
    for fact in FACTS:
        assert sum(line.startswith(f"    {fact} ") for line in lines) == len(recipe_names())


def assert_sets(args: Any, name: str) -> None:
    """Settings hold what a recipe says."""
    for setting, value in read_recipe(name, type(args)).items():
        actual = getattr(args, setting)
        if setting == "augmentation" and isinstance(value, dict):
            value = describe(find_recipes(value))
        assert type(actual)(value) == actual  # YAML reads 2e-3 as a string


@pytest.mark.parametrize("name", sorted(EVALUATION))
def test_every_recipe_of_evaluation_sets_what_it_says(name: str) -> None:
    words = ["--model=m", "--dataset_name=d", "--config", name]
    assert_sets(parse_evaluation_arguments(words), name)


def test_imagenet100_takes_the_views_of_the_paper_and_the_crops_of_solo_learn() -> None:
    recipes = find_recipes(parse_arguments(["--config=imagenet100-r18"]).augmentation or "")
    assert recipes.x == recipes.x_prime == replace(PRESETS["paper"].x, scale=(0.2, 1.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), rows=24, size=(70, 66))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_is_for_sets_what_it_says_and_builds_it(name: str) -> None:
    about = read_about(name)
    assert all(about[fact] for fact in FACTS)
    assert any(words in about["source"] for words in ("this project", "not run here", "none"))
    recipe = parse_arguments(["--config", name])
    assert_sets(recipe, name)
    with torch.device("meta"):  # which takes no memory
        model = VICRegModel(
            VICRegConfig(
                architecture=str(recipe.architecture), expander_dims=recipe.expander_widths
            )
        )
    widths = [layer.out_features for layer in model.expander if hasattr(layer, "out_features")]
    assert widths == recipe.expander_widths
    if recipe.dataset_name == "unnamed":  # for data of one's own
        with pytest.raises(ValueError, match=r"^dataset_name must be given"):
            open_dataset(recipe.dataset_name)


# tens of millions of weights take their time, and those of the second are those of -100ep
LARGE = {"imagenet-r50x2", "imagenet-r50-1000ep"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
     for name in recipe_names()],
)  # fmt: skip
def test_every_recipe_is_stepped(name: str, images: Path, tmp_path: Path) -> None:
    recipe = parse_arguments(["--config", name])
    overrides = {
        "dataset_name": str(images), "output_dir": str(tmp_path), "batch_size": 4, "max_steps": 1,
        "warmup_epochs": 0, "num_workers": 0, "image_size": 32, "expander_dims": "16-16",
        "pretrained": False, "compile": False,
    }  # fmt: skip
    if recipe.micro_batch_size is not None:
        overrides["micro_batch_size"] = 2
    if recipe.label_column is not None:
        overrides["label_column"] = "kind"
    run = setup(PretrainingArguments.from_recipe(name, **overrides))
    before = run.model.expander[-1].weight.detach().clone()  # pyright: ignore
    run.wrapped.train()
    (views,) = views_from_here(run)
    step = take_gradients(run, views)
    assert step.output.loss is not None
    assert torch.isfinite(step.output.loss)
    assert torch.isfinite(step.grad_norm)
    take_step(run)
    assert not torch.equal(before, run.model.expander[-1].weight)  # pyright: ignore
