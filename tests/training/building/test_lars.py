"""LARS against steps worked by hand, the authors' formulas and solo-learn's clipping."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vicreg_hf.training.building.optimizers import LARS

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


@pytest.mark.parametrize("foreach", [False, True])
def test_lars_without_any_gradient_moves_nothing(foreach: bool) -> None:
    p = parameter([[3.0, 4.0]])
    LARS([p], lr=0.5, weight_decay=0.1, foreach=foreach).step()
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
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "eta": 1e-3}
    assert defaults == settings | {"clip": False, "foreach": None}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", None, True])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "eta"])
def test_lars_refuses_settings_that_cannot_be(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"lr": 0.1, name: value}
    message = f"^{name} must be a finite number of at least 0, got {value!r}.$"
    with pytest.raises(ValueError, match=message):
        LARS([parameter([1.0])], **settings)
    optimizer = LARS([parameter([1.0])], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter([1.0])], name: value})
    assert len(optimizer.param_groups) == 1


def test_lars_refuses_momentum_that_grows() -> None:
    with pytest.raises(ValueError, match=r"momentum must be at most 1, got 1\.5"):
        LARS([parameter([1.0])], lr=0.1, momentum=1.5)


def test_lars_takes_a_rate_that_is_a_tensor() -> None:
    p = parameter([1.0])
    rate: Any = torch.tensor(0.25)
    assert_values(after_step(p, LARS([p], lr=rate), [1.0]), [0.75])
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, got nan"):
        LARS([p], lr=rate * math.nan)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight", "grad", "expected"),
    [(1.0, 300.0, 0.75), (300.0, 1.0, 225.0), (300.0, 300.0, 225.0), (0.5, 1.0, 0.375)],
)
def test_norms_beyond_half_precision_keep_their_step(
    weight: float, grad: float, expected: float, dtype: torch.dtype, foreach: bool
) -> None:
    """The step is eta |p| / |grad| times grad, a quarter of the weight; 300 has a norm of 76800."""
    p = nn.Parameter(torch.full((256, 256), weight, dtype=dtype))
    optimizer = LARS([p], lr=1.0, momentum=0.0, weight_decay=0.0, eta=0.25, foreach=foreach)
    p.grad = torch.full_like(p, grad)
    optimizer.step()
    assert p.dtype == optimizer.state[p]["momentum_buffer"].dtype == dtype
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=0.01, atol=0)


# Clipping the trust ratio


class SoloLearnsLARS:
    """solo-learn's solo/utils/lars.py with clip_lr, but for the denominator, which is ours."""

    def __init__(self, lr: float, momentum: float, weight_decay: float, eta: float) -> None:
        self.lr, self.momentum, self.weight_decay, self.eta = lr, momentum, weight_decay, eta
        self.buffers: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        for index, (p, grad) in enumerate(zip(params, grads, strict=True)):
            d_p = grad
            if p.ndim != 1:
                d_p = grad + self.weight_decay * p
                p_norm, norm = np.linalg.norm(p), np.linalg.norm(d_p)
                if p_norm != 0 and norm != 0:
                    lars_lr = min(p_norm / norm * self.eta / self.lr, 1)
                    d_p = d_p * lars_lr
            self.buffers[index] = self.momentum * self.buffers.get(index, np.zeros_like(p)) + d_p
            p -= self.lr * self.buffers[index]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 0.02, 1.0])  # of three, all, some and none are clipped
def test_many_steps_of_clipped_lars_match_solo_learn(lr: float, foreach: bool) -> None:
    random = np.random.default_rng(0)
    arrays = [scale * random.normal(size=(4, 3)) for scale in (0.2, 1.0, 5.0)]
    arrays += [random.normal(size=4), np.zeros((3, 2))]
    params = [nn.Parameter(torch.from_numpy(array.copy())) for array in arrays]
    ours = LARS(params, lr, weight_decay=1e-4, eta=0.02, clip=True, foreach=foreach)
    theirs = SoloLearnsLARS(lr, 0.9, 1e-4, 0.02)
    for _ in range(5):
        grads = [random.normal(size=array.shape) for array in arrays]
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(grad)
        ours.step()
        theirs.step(arrays, grads)
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), array, rtol=1e-12, atol=1e-14)


def test_a_clipped_rate_is_the_lower_of_adapted_and_plain() -> None:
    p = parameter([[3.0, 4.0]])  # eta |p| / |grad| = 0.25
    optimizer = LARS([p], lr=1.0, momentum=0.0, weight_decay=0.0, eta=0.1, clip=True)
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 3.5]])
    p = parameter([[3.0, 4.0]])
    optimizer = LARS([p], lr=0.125, momentum=0.0, weight_decay=0.0, eta=0.1, clip=True)
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 3.75]])


@pytest.mark.parametrize("foreach", [False, True])
def test_at_a_rate_of_zero_clipped_lars_gathers_momentum_and_moves_nothing(foreach: bool) -> None:
    p = parameter([[3.0, 4.0]])
    optimizer = LARS([p], lr=0.0, weight_decay=0.0, clip=True, foreach=foreach)
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 4.0]])
    assert_values(optimizer.state[p]["momentum_buffer"], [[0.0, 2.0]])


def test_a_state_from_before_there_was_clipping_is_taken() -> None:
    p = parameter([[3.0, 4.0]])
    old = LARS([p], lr=0.5)
    after_step(p, old, [[1.0, 2.0]])
    state = old.state_dict()
    for name in ("clip", "foreach"):
        del state["param_groups"][0][name]
    new = LARS([p], lr=0.5)
    new.load_state_dict(state)
    assert new.state_dict()["param_groups"] == old.state_dict()["param_groups"]
