"""Optimisers by name, and their states."""

from __future__ import annotations

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from vicreg_hf.training.building.optimizers import LARS, create_optimizer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("name", "kind"), [("lars", LARS), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_an_optimiser_is_made_by_name_and_decays_weights_but_no_bias_and_no_norm(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    model = network()
    nn.init.ones_(model.get_parameter("0.bias"))
    model[2].bias.requires_grad_(False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = create_optimizer(name, model, lr=0.25, weight_decay=0.5)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"0.weight", "2.weight"}


def test_a_loaded_state_leaves_settings_as_they_are() -> None:
    model = network()
    old = create_optimizer("lars", model, lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    old.step()
    new = create_optimizer("lars", model, lr=0.1, weight_decay=0.5, lars_eta=0.02, lars_clip=True)
    new.load_state_dict(old.state_dict())
    (group,) = new.param_groups
    assert (group["weight_decay"], group["eta"], group["clip"]) == (0.5, 0.02, True)
    for p in model.parameters():
        assert torch.equal(new.state[p]["momentum_buffer"], old.state[p]["momentum_buffer"])


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    return model.to(dtype=torch.float64, memory_format=torch.channels_last)  # pyright: ignore


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "momentum"])
def test_fused_steps_are_the_plain_ones_to_rounding_also_from_a_plain_state(name: str) -> None:
    """As checkpoints hold it that were written before there was a fused one."""
    expected, model = convolutions(), convolutions()
    train(expected, create_optimizer(name, expected, lr=1e-3, weight_decay=0.1), range(6))
    plain = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.1, foreach=False)
    train(model, plain, range(3))
    fused = create_optimizer(name, model, lr=1e-3, weight_decay=0.1)
    fused.load_state_dict(plain.state_dict())
    assert all(group["fused"] for group in fused.param_groups)
    assert not any(group["foreach"] for group in fused.param_groups)
    train(model, fused, range(3, 6))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [0, 2])
def test_a_state_of_other_groups_is_refused(groups: int) -> None:
    optimizer = create_optimizer("lars", network(), lr=0.1, weight_decay=0.1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state | {"param_groups": state["param_groups"] * groups})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamx", r"'adamx'.*adamw"),
        # no file can hold its settings
        ("adafactorbv", r"adafactorbv.*torch\.bfloat16.*choose another"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(name, network(), lr=0.1, weight_decay=0.0)
