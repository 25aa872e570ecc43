"""Optimisers by name, their states, and the learning rate of each step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from vicreg_hf.checkpoints.contents import join_tensors, split_tensors
from vicreg_hf.settings.pretraining import default_base_lr
from vicreg_hf.training.building.optimizers import LARS, create_optimizer, learning_rate

# Choosing an optimiser


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("name", "kind"), [("lars", LARS), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimisers_are_made_by_name(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = create_optimizer(name, network(), lr=0.25, weight_decay=0.125)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_an_optimiser_holds_every_trained_parameter_once(name: str) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = create_optimizer(name, model, lr=0.1, weight_decay=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_weight_decay_moves_weights_but_no_bias_and_no_norm(name: str) -> None:
    model = network()
    nn.init.ones_(model.get_parameter("0.bias"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = create_optimizer(name, model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {"0.weight", "2.weight"}


def test_settings_of_lars_are_handed_on() -> None:
    optimizer = create_optimizer(
        "lars", network(), lr=0.1, weight_decay=0.5, lars_eta=0.02, lars_clip=True
    )
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["eta"], group["clip"]) == (0.5, 0.02, True)


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
    return model.to(memory_format=torch.channels_last)  # pyright: ignore


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x.to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()


FUSED = ["adam", "adamw", "sgd", "momentum"]


@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_are_the_plain_ones_to_rounding(name: str) -> None:
    fused, plain = convolutions(), convolutions()
    optimizer = create_optimizer(name, fused, lr=1e-3, weight_decay=0.1)
    assert all(group["fused"] for group in optimizer.param_groups)
    expected = create_optimizer_v2(plain, opt=name, lr=1e-3, weight_decay=0.1, foreach=False)
    train(fused, optimizer, range(5))
    train(plain, expected, range(5))
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "radam", "nadam", "lamb", *FUSED])
def test_a_state_that_was_in_a_file_goes_on_with_the_same_bits(name: str) -> None:
    """A file keeps values and no layout; the weights are laid out before the state is loaded."""
    expected, model = convolutions(), convolutions()
    train(expected, create_optimizer(name, expected, lr=1e-3, weight_decay=0.1), range(6))
    first = create_optimizer(name, model, lr=1e-3, weight_decay=0.1)
    train(model, first, range(3))
    tensors, rest = split_tensors(first.state_dict())
    second = create_optimizer(name, model, lr=1e-3, weight_decay=0.1)
    kept = {key: value.clone(memory_format=torch.contiguous_format)
            for key, value in tensors.items()}  # fmt: skip
    second.load_state_dict(join_tensors(kept, json.loads(json.dumps(rest))))
    train(model, second, range(3, 6))
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


def test_an_optimiser_whose_settings_no_file_can_hold_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"adafactorbv.*torch\.bfloat16.*choose another"):
        create_optimizer("adafactorbv", convolutions(), lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("name", FUSED)
def test_a_state_of_the_plain_optimiser_goes_on_fused(name: str) -> None:
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
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [0, 2])
def test_a_state_of_other_groups_is_refused(groups: int) -> None:
    optimizer = create_optimizer("lars", network(), lr=0.1, weight_decay=0.1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state | {"param_groups": state["param_groups"] * groups})


def test_an_unknown_optimiser_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"'adamx'.*adamw"):
        create_optimizer("adamx", network(), lr=0.1, weight_decay=0.0)


# The learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5, 1.0),
        (9, 1.8),
        (10, 2.0),  # warm-up is over
        (60, 1.001),  # half way down to 0.002
        (109, 0.002 + 1.998 * 0.5 * (1 + math.cos(math.pi * 0.99))),  # the last step
        (110, 0.002),
    ],
)
def test_learning_rate_matches_values_worked_by_hand(step: int, expected: float) -> None:
    lr = learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110)
    assert lr == pytest.approx(expected, rel=1e-12)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=10) == 2.0


def test_a_run_that_is_all_warmup_has_a_learning_rate_at_every_step() -> None:
    rates = [learning_rate(step, peak=4.0, warmup_steps=4, total_steps=4) for step in range(4)]
    assert rates == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "expected"),
    [
        ("lars", 128, 0.8),
        ("lars", 256, 0.5),
        ("lars", 512, 0.4),
        ("lars", 1024, 0.3),
        ("lars", 4096, 0.3),
        ("adamw", 128, 1e-3),
        ("adamw", 4096, 1e-3),
    ],
)
def test_default_base_lr_is_the_papers_by_batch_size(
    optimizer: str, batch_size: int, expected: float
) -> None:
    assert default_base_lr(optimizer, batch_size) == expected
