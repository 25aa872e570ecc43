"""Loss, batch norms, views, micro-batches and snapshots on a GPU against what they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors_loss import LOSSES, assert_exact, views_of
from safetensors.torch import load_file
from torch import Tensor, nn
from workflow import SMALL

from vicreg_hf import TwoViews, VICRegConfig, VICRegModel, vicreg_loss
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.gradcache import backward_in_chunks
from vicreg_hf.training.resuming import save, wait_until_saved
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients, take_step, views_from_here
from vicreg_hf.views import operations

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default", "error:views are made")]


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


# Batch normalisation


def norms(device: torch.device) -> nn.ModuleDict:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "plain": nn.BatchNorm2d(16),
        "frozen": nn.BatchNorm2d(16),
        "without weights": nn.BatchNorm2d(16, affine=False),
        "without running statistics": nn.BatchNorm2d(16, track_running_stats=False),
    }
    for norm in made.values():
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    made["frozen"].eval().requires_grad_(False)
    return nn.ModuleDict(made).to(device)


def normalised_by_each(made: nn.ModuleDict, xs: list[Tensor]) -> list[Tensor]:
    return [norm(x) for norm, x in zip(made.values(), xs, strict=True)]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_synchronised_batch_norm_is_torchs_on_one_process(
    dtype: torch.dtype, layout: Any, compiled: bool, device: torch.device, tiny: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 4, 16, 3, 2) if tiny else (2, 64, 16, 9, 7)
    made = torch.randn(shape, generator=generator).to(device)
    x, slope = (y.to(dtype).contiguous(memory_format=layout) for y in (made[0] * 3 + 2, made[1]))
    compiled = compiled and not tiny  # a CPU's compiled ones: `tests/models/test_batch_norm.py`

    def results_of(norms: Any, call: Any) -> dict[str, Tensor]:
        xs = [x.clone().requires_grad_() for _ in norms]
        ys = call(norms, xs)
        torch.autograd.backward(ys, [slope] * len(ys))
        found: dict[str, Any] = {}
        for kind, given, y in zip(norms, xs, ys, strict=True):
            found |= {f"{kind}: output": y.detach(), f"{kind}: gradient": given.grad}
        gradients = {f"{name}.grad": p.grad for name, p in norms.named_parameters()}
        return found | norms.state_dict() | {k: g for k, g in gradients.items() if g is not None}

    expected = results_of(norms(device), normalised_by_each)
    call: Any = normalised_by_each
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False)
    found = results_of(SyncBatchNorm.convert(norms(device)), call)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        wanted = expected[name]
        assert value.dtype == wanted.dtype, name
        # what is of half precision was rounded once, on either side
        close = max(1e-4, 2 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0)
        torch.testing.assert_close(
            value, wanted, rtol=close, atol=close, msg=lambda said, name=name: f"{name}: {said}"
        )


# Views


def each(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 16)


ROWS = torch.arange(16)
BOXES = torch.stack([ROWS, 2 * ROWS, 10 + 3 * ROWS, 15 + 3 * ROWS], 1)
OPERATIONS: dict[str, tuple[Any, ...]] = {
    "crop": (operations.resized_crop, BOXES),
    "brightness": (operations.adjust_brightness, each(0.6, 1.4)),
    "contrast": (operations.adjust_contrast, each(0.6, 1.4)),
    "saturation": (operations.adjust_saturation, each(0.8, 1.2)),
    "hue": (operations.adjust_hue, each(-0.1, 0.1)),
    "grayscale": (operations.grayscale,),
    "blur": (operations.gaussian_blur, operations.box_weights(each(0.1, 2.0), 2.0)),
    "solarise": (operations.solarize,),
}  # fmt: skip
"""Each operation, and a parameter for each of 16 images."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_the_cpu_within_one_level(
    name: str, photographs: Tensor, device: torch.device
) -> None:
    operation, *values = OPERATIONS[name]
    side = [32] if name == "crop" else []
    found = operation(*(x.to(device) for x in (photographs, *values)), *side)
    expected = operation(photographs, *values, *side)
    assert int((found.cpu().int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("preset", ["authors", "cifar"])
def test_views_are_those_of_the_cpu_within_one_level(
    preset: str, compiled: bool, photographs: Tensor, device: torch.device, tiny: bool
) -> None:
    compiled = compiled and not tiny  # `test_kernels` compiles for a CPU
    images = photographs if tiny else photographs.repeat(8, 1, 1, 1)
    rows, levels = np.arange(len(images)), 255 * 0.2  # the deviation that is divided by
    plain = TwoViews(32, preset, std=(0.2,) * 3)
    own = TwoViews(32, preset, std=(0.2,) * 3, compile=compiled)
    crops = plain.crop(list(images), rows, 1)
    moved: Any = tuple(crop.to(device) for crop in crops)
    pairs = [
        (own(images.to(device), rows, 1), plain(images, rows, 1)),
        (own.transform_crops(moved, rows, 1), plain.transform_crops(crops, rows, 1)),
    ]
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
    model: Any = VICRegModel(config).double().train()
    model.to(device)
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
