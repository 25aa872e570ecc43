"""Every shipped recipe: listed, complete, built at its full width, and stepped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from warm import run_script
from workflow import write_images

from vicreg_hf import PretrainingArguments
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.recipes import FACTS, read_about, recipe_names
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients, take_step, views_from_here

WANTED = {
    "imagenet-r50-100ep", "imagenet-r50-1000ep", "imagenet-r50x2", "imagenet100-r18",
    "cifar10-r18", "cifar100-r18", "imagenette-r18", "vit-small-224", "small-data", "tiny-cpu",
    "demo",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), rows=40, size=(70, 66))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_built_and_stepped(name: str, images: Path, tmp_path: Path) -> None:
    given = parse_arguments(["--config", name])
    overrides = {
        "dataset_name": str(images), "output_dir": str(tmp_path), "batch_size": 4,
        "max_steps": 2, "warmup_epochs": 0, "num_workers": 0,
        # 224 pixels would only take longer; weights cannot be downloaded here
        "image_size": min(64, given.image_size or 64), "pretrained": False, "compile": False,
    }  # fmt: skip
    if given.micro_batch_size is not None:
        overrides["micro_batch_size"] = 2
    if given.label_column is not None:
        overrides["label_column"] = "kind"
    run = setup(PretrainingArguments.from_recipe(name, **overrides))
    for tensor in (run.model.expander[-1].weight, next(run.model.backbone.parameters())):
        assert tensor.requires_grad
    widths = [layer.out_features for layer in run.model.expander if hasattr(layer, "out_features")]
    assert widths == given.expander_widths
    before = run.model.expander[-1].weight.detach().clone()  # pyright: ignore
    run.wrapped.train()
    for views in views_from_here(run):
        step = take_gradients(run, views)
        assert step.output.loss is not None
        assert torch.isfinite(step.output.loss)
        assert torch.isfinite(step.grad_norm)
        take_step(run)
    assert run.step == 2
    assert not torch.equal(before, run.model.expander[-1].weight)  # pyright: ignore


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_is_for(name: str) -> None:
    about = read_about(name)
    assert all(about[fact] for fact in FACTS)
    measured = "this project" in about["source"]
    assert measured or "not run here" in about["source"] or "none" in about["source"]


def test_the_recipes_asked_for_are_there() -> None:
    assert set(recipe_names()) >= WANTED


def test_recipes_are_listed() -> None:
    done = run_script("scripts/pretrain.py", "--list_recipes")
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^(\S+)$", done.stdout, flags=re.MULTILINE)
    assert listed == recipe_names()
    assert "ILSVRC" not in done.stdout
    for fact in FACTS:
        assert len(re.findall(rf"^    {fact} ", done.stdout, flags=re.MULTILINE)) == len(listed)
