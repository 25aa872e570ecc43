"""A small model with its optimiser, trained and compared, and checkpoints of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.checkpoints.writing import CheckpointWriter
from vicreg_hf.training.building.optimizers import create_optimizer

Objects = tuple[VICRegModel, Optimizer]
PROBE_STATE = {"weight": torch.arange(3.0)}


def fresh(optimizer: str = "lars", *, seed: int = 0, width: int = 8) -> Objects:
    """A model with running statistics (test_resnet) and an optimiser without any state."""
    torch.manual_seed(seed)
    config = VICRegConfig(architecture="test_resnet", expander_dims=[width, width])
    model = VICRegModel(config).train()
    return model, create_optimizer(optimizer, model, lr=1e-2, weight_decay=1e-3)


def train(objects: Objects, *, first: int, last: int) -> None:
    model, optimizer = objects
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, 4, 3, 32, 32, generator=generator)
        model(*views).loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def trained() -> Objects:
    """The objects after a step, which no test changes."""
    objects = fresh()
    train(objects, first=0, last=1)
    return objects


def everything(objects: Objects) -> dict[str, Any]:
    """Weights, buffers and optimiser state under flat names."""
    model, optimizer = objects
    state = optimizer.state_dict()
    entries = {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return {**model.state_dict(), **entries}


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, Tensor) else (
            actual[name] == value
        )  # fmt: skip
        assert same, name


def save(folder: Path, step: int, objects: Objects | None = None, **state: Any) -> Path:
    """A checkpoint by a writer of its own, as a run that was started again has."""
    writer = CheckpointWriter(folder)
    writer.save(step, *(objects or trained()), state, probe=PROBE_STATE)
    writer.wait()
    return folder / f"step-{step}"
