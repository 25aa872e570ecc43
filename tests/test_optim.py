"""LARS and the learning rate against steps worked by hand and the authors' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vicreg_hf.optim import LARS, create_optimizer, default_base_lr, learning_rate

Array = NDArray[np.float64]


def parameter(values: list[float] | list[list[float]]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def after_step(
    p: nn.Parameter, optimizer: torch.optim.Optimizer, grad: list[float] | list[list[float]]
) -> Tensor:
    p.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer.step()
    return p.detach().clone()


def assert_values(actual: Tensor, expected: list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_two_steps_of_lars_match_values_worked_by_hand() -> None:
    p = parameter([[3.0, 4.0]])
    optimizer = LARS([p], lr=1.0, momentum=0.9, weight_decay=0.0, eta=0.1)
    # norms 5 and 2: ratio 0.1 * 5 / 2, update 0.5
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 3.5]])
    # norm of [3, 3.5] is 4.6098: update 0.46098 beside momentum 0.9 * 0.5
    update = 0.1 * math.hypot(3, 3.5) + 0.45
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 3.5 - update]])


def test_trust_ratio_takes_the_norm_of_gradient_plus_weight_decay() -> None:
    p = parameter([[3.0, 4.0]])
    optimizer = LARS([p], lr=1.0, momentum=0.0, weight_decay=1.0, eta=0.1)
    # update [3, 4] + [-3, 8] = [0, 12]; ratio 0.1 * 5 / 12, where the gradient's norm is 8.5
    assert_values(after_step(p, optimizer, [[-3.0, 8.0]]), [[3.0, 3.5]])


def test_weight_decay_alone_moves_weights_by_eta() -> None:
    p = parameter([[3.0, 4.0]])
    optimizer = LARS([p], lr=1.0, momentum=0.0, weight_decay=1e-6, eta=0.1)
    assert_values(after_step(p, optimizer, [[0.0, 0.0]]), [[2.7, 3.6]])


def test_one_dimensional_parameters_get_plain_momentum() -> None:
    p = parameter([1.0, 2.0])
    optimizer = LARS([p], lr=0.5, momentum=0.9, weight_decay=0.3, eta=0.1)
    assert_values(after_step(p, optimizer, [1.0, 1.0]), [0.5, 1.5])
    assert_values(after_step(p, optimizer, [1.0, 1.0]), [0.5 - 0.95, 1.5 - 0.95])


def test_zero_weights_take_a_plain_step() -> None:
    p = parameter([[0.0, 0.0]])
    optimizer = LARS([p], lr=0.5, weight_decay=0.1, eta=1e-3)
    assert_values(after_step(p, optimizer, [[1.0, -2.0]]), [[-0.5, 1.0]])


def test_zero_updates_leave_weights_as_they_are() -> None:
    p = parameter([[3.0, 4.0]])
    assert_values(after_step(p, LARS([p], lr=0.5, weight_decay=0.0), [[0.0, 0.0]]), [[3.0, 4.0]])


def test_parameters_without_a_gradient_are_left_alone() -> None:
    p = parameter([[3.0, 4.0]])
    LARS([p], lr=0.5, weight_decay=0.1).step()
    assert_values(p.detach(), [[3.0, 4.0]])


class AuthorsLARS:
    """vicreg@4e12602, main_vicreg.py, LARS, in numpy; biases and norms are those of one axis."""

    def __init__(self, lr: float, momentum: float, weight_decay: float, eta: float) -> None:
        self.lr, self.momentum, self.weight_decay, self.eta = lr, momentum, weight_decay, eta
        self.mu: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        for index, (p, grad) in enumerate(zip(params, grads, strict=True)):
            dp = grad.copy()
            if p.ndim != 1:
                dp = dp + self.weight_decay * p
                param_norm, update_norm = np.linalg.norm(p), np.linalg.norm(dp)
                q = 1.0
                if param_norm > 0 and update_norm > 0:
                    q = self.eta * param_norm / update_norm
                dp = dp * q
            self.mu[index] = self.momentum * self.mu.get(index, np.zeros_like(p)) + dp
            p -= self.lr * self.mu[index]


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_steps_of_lars_match_the_authors(momentum: float, weight_decay: float) -> None:
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape) for shape in ((4, 3), (4,), (2, 3, 5, 5), (1,))]
    arrays.append(np.zeros((3, 2)))
    params = [nn.Parameter(torch.from_numpy(array.copy())) for array in arrays]
    ours = LARS(params, lr=0.7, momentum=momentum, weight_decay=weight_decay, eta=0.02)
    theirs = AuthorsLARS(0.7, momentum, weight_decay, 0.02)
    for _ in range(5):
        grads = [random.normal(size=array.shape) for array in arrays]
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(grad.copy())
        ours.step()
        theirs.step(arrays, grads)
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), array, rtol=1e-12, atol=1e-14)


def test_lars_leaves_gradients_as_they_were() -> None:
    p = parameter([[3.0, 4.0]])
    after_step(p, LARS([p], lr=1.0, weight_decay=1.0), [[1.0, 2.0]])
    assert p.grad is not None
    assert_values(p.grad, [[1.0, 2.0]])


def test_groups_keep_their_own_settings() -> None:
    slow, fast = parameter([1.0]), parameter([1.0])
    optimizer = LARS([{"params": [slow]}, {"params": [fast], "lr": 0.5}], lr=0.1)
    slow.grad, fast.grad = torch.ones_like(slow), torch.ones_like(fast)
    optimizer.step()
    assert_values(torch.stack([slow, fast]).detach(), [[0.9], [0.5]])


def test_lars_returns_the_loss_of_its_closure() -> None:
    p = parameter([1.0])

    def closure() -> float:
        loss = (2 * p).sum()
        loss.backward()
        return loss.item()

    assert LARS([p], lr=0.1).step(closure) == 2.0
    assert_values(p.detach(), [0.8])


def test_lars_defaults_are_the_authors() -> None:
    defaults = LARS([parameter([1.0])], lr=0.1).defaults
    assert defaults == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "eta": 1e-3}


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "eta"])
def test_lars_refuses_negative_settings(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        LARS([parameter([1.0])], **{"lr": 0.1, name: -1.0})


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
