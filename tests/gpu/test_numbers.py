"""Loss, views, micro-batches and snapshots on a GPU against what they must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors_loss import LOSSES, assert_exact, views_of
from safetensors.torch import load_file
from torch import Tensor
from workflow import SMALL

from vicreg_hf import TwoViews, VICRegConfig, VICRegModel, vicreg_loss
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.gradcache import backward_in_chunks
from vicreg_hf.training.resuming import save, wait_until_saved
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients, take_step, views_from_here
from vicreg_hf.views import operations
from vicreg_hf.views.operations import box_weights
from vicreg_hf.views.presets import PRESETS, ViewRecipe

pytestmark = pytest.mark.gpu

QUICK_TO_COMPILE = (ViewRecipe(flip=0.0, jitter=0.0, grayscale=0.0),) * 2


# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "dim", "few"),
    [(4096, 8192, (24, 40)), (4096, 2048, (40, 24))], ids=["Gram form", "covariance form"],
)  # fmt: skip
def test_loss_and_gradient_are_those_of_float64(
    rows: int, dim: int, few: tuple[int, int], dtype: torch.dtype, device: torch.device, tiny: bool
) -> None:
    made = views_of(2, *(few if tiny else (rows, dim)), dtype=dtype)
    views = [z.detach().to(device).requires_grad_() for z in made]
    definition = LOSSES["two views"][2]
    assert_exact(vicreg_loss(*views).loss, views, definition)


# Views


def operation_calls() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each operation on a batch (B, 3, H, W), with a parameter of its own for each image."""

    def each(x: Tensor, low: float, high: float) -> Tensor:
        return torch.linspace(low, high, len(x), device=x.device)

    def cropped(x: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        sides = 10 + 3 * rows
        boxes = torch.stack([rows, 2 * rows, sides, sides + 5], 1)
        return operations.resized_crop(x, boxes, 32)

    return {
        "crop": cropped,
        "brightness": lambda x: operations.adjust_brightness(x, each(x, 0.6, 1.4)),
        "contrast": lambda x: operations.adjust_contrast(x, each(x, 0.6, 1.4)),
        "saturation": lambda x: operations.adjust_saturation(x, each(x, 0.8, 1.2)),
        "hue": lambda x: operations.adjust_hue(x, each(x, -0.1, 0.1)),
        "grayscale": operations.grayscale,
        "blur": lambda x: operations.gaussian_blur(x, box_weights(each(x, 0.1, 2.0), 2.0)),
        "solarise": operations.solarize,
    }


@pytest.mark.parametrize("name", operation_calls())
def test_an_operation_is_that_of_the_cpu_within_one_level(
    name: str, photographs: Tensor, device: torch.device
) -> None:
    call = operation_calls()[name]
    found, expected = call(photographs.to(device)).cpu(), call(photographs)
    assert int((found.int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("preset", ["authors", "cifar"])
def test_views_are_those_of_the_cpu_within_one_level(
    preset: str, compiled: bool, photographs: Tensor, device: torch.device, tiny: bool
) -> None:
    quick = tiny and compiled
    recipes = QUICK_TO_COMPILE if quick else PRESETS[preset][:2]
    images = photographs if tiny else photographs.repeat(8, 1, 1, 1)
    rows, levels = np.arange(len(images)), 255 * 0.2  # the deviation that is divided by
    plain = TwoViews(32, recipes, std=(0.2,) * 3)
    own = TwoViews(32, recipes, std=(0.2,) * 3, compile=compiled)
    crops = plain.crop(list(images), rows, 1)
    moved: Any = tuple(crop.to(device) for crop in crops)
    pairs = [(own.transform_crops(moved, rows, 1), plain.transform_crops(crops, rows, 1))]
    if not quick:
        pairs.append((own(images.to(device), rows, 1), plain(images, rows, 1)))
    for found, expected in pairs:
        for view, wanted in zip(found, expected, strict=True):
            away = (view.cpu() - wanted).abs() * levels
            # a level that one operation rounds otherwise may be two after the next
            assert float((away > 1.01).float().mean()) < 1e-4
            assert float(away.max()) < 4.01
    assert own.kernels.compiled == compiled  # it did not fall back


# Gradients in parts, and copies while training goes on


@pytest.mark.parametrize("rates", [{}, {"drop_rate": 0.3, "drop_path_rate": 0.3}], ids=str)
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    rates: dict[str, float], device: torch.device
) -> None:
    """In float64, with the random numbers of a graph that encodes the same parts."""
    args: dict[str, Any] = {"img_size": 32, **rates}
    config = VICRegConfig(architecture="test_vit", model_args=args, expander_dims=[24, 40])
    torch.manual_seed(0)
    model = VICRegModel(config).double().to(device).train()
    views = torch.randn(2, 12, 3, 32, 32, dtype=torch.float64).to(device)
    torch.manual_seed(2)
    y = (torch.cat([model.backbone(part) for part in view.split(5)]) for view in views)
    whole: Any = model(*y, encoded=True).loss
    expected = torch.autograd.grad(whole, list(model.parameters()))
    torch.manual_seed(2)
    output = backward_in_chunks(model, views[0], views[1], chunk_size=5)
    torch.testing.assert_close(output.loss, whole.detach(), rtol=1e-11, atol=1e-11)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-11)


def test_a_snapshot_is_of_its_step_although_training_goes_on(
    images: Path, tmp_path: Path, device: torch.device, tiny: bool
) -> None:
    flags = [f"--dataset_name={images}", f"--output_dir={tmp_path}", "--max_steps=9"]
    width = "32-32" if tiny else "4096-4096"  # a copy that takes longer than a step
    run = setup(parse_arguments([*SMALL, *flags, f"--expander_dims={width}"]))
    assert run.accelerator.device.type == device.type
    run.wrapped.train()
    for views in views_from_here(run):
        take_gradients(run, views)
        take_step(run)
        if run.step % 3 == 0:
            wait_until_saved(run)
            save(run)
            kept = {name: value.clone() for name, value in run.model.state_dict().items()}
        elif run.step % 3 == 2 and run.step > 3:
            wait_until_saved(run)
            path = tmp_path / "checkpoints" / f"step-{run.step - 2}" / "model.safetensors"
            saved = load_file(path)
            assert saved.keys() == kept.keys()
            assert all(torch.equal(saved[name], value.cpu()) for name, value in kept.items())
            assert not all(
                torch.equal(saved[name], value.cpu())
                for name, value in run.model.state_dict().items()
            )
