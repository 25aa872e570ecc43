"""LARS against steps worked by hand, the authors' formulas and solo-learn's clipping.

Values are float64; a step of many parameters at once is held to the plain one.
"""

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


def parameter(values: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def after_step(p: nn.Parameter, optimizer: LARS, grad: Any) -> Tensor:
    p.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer.step()
    return p.detach().clone()


def assert_values(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_two_steps_of_lars_match_values_worked_by_hand() -> None:
    p = parameter([[3.0, 4.0]])
    optimizer = LARS([p], lr=1.0, momentum=0.9, weight_decay=0.0, eta=0.1)
    # norms 5 and 2: ratio 0.1 * 5 / 2, update 0.5
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 3.5]])
    # norm of [3, 3.5] is 4.6098: update 0.46098 beside momentum 0.9 * 0.5
    update = 0.1 * math.hypot(3, 3.5) + 0.45
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 3.5 - update]])
    assert_values(p.grad, [[0.0, 2.0]])  # pyright: ignore  # the gradient is left as it was


@pytest.mark.parametrize(
    ("start", "grad", "settings", "expected"),
    [
        # update [3, 4] + [-3, 8] = [0, 12]; ratio 0.1 * 5 / 12, where the gradient's norm is 8.5
        ([[3.0, 4.0]], [[-3.0, 8.0]], {"lr": 1.0, "weight_decay": 1.0}, [[3.0, 3.5]]),
        # weight decay alone moves weights by eta
        ([[3.0, 4.0]], [[0.0, 0.0]], {"lr": 1.0, "weight_decay": 1e-6}, [[2.7, 3.6]]),
        # one dimension: neither decay nor adaptation
        ([1.0, 2.0], [1.0, 1.0], {"lr": 0.5, "weight_decay": 0.3}, [0.5, 1.5]),
        # weights of zero take a plain step, and updates of zero leave weights as they are
        ([[0.0, 0.0]], [[1.0, -2.0]], {"lr": 0.5, "weight_decay": 0.1}, [[-0.5, 1.0]]),
        ([[3.0, 4.0]], [[0.0, 0.0]], {"lr": 0.5, "weight_decay": 0.0}, [[3.0, 4.0]]),
        # clipped: the lower of the adapted rate, eta |p| / |grad| = 0.25, and lr
        ([[3.0, 4.0]], [[0.0, 2.0]], {"lr": 1.0, "weight_decay": 0.0, "clip": True}, [[3.0, 3.5]]),
        ([[3.0, 4.0]], [[0.0, 2.0]], {"lr": 0.125, "weight_decay": 0, "clip": True}, [[3.0, 3.75]]),
    ],
)
def test_a_step_matches_values_worked_by_hand(
    start: Any, grad: Any, settings: dict[str, Any], expected: Any
) -> None:
    for foreach in (False, True):
        p = parameter(start)
        optimizer = LARS([p], momentum=0.0, eta=0.1, foreach=foreach, **settings)
        assert_values(after_step(p, optimizer, grad), expected)


@pytest.mark.parametrize("foreach", [False, True])
def test_at_a_rate_of_zero_clipped_lars_gathers_momentum_and_moves_nothing(foreach: bool) -> None:
    p, without = parameter([[3.0, 4.0]]), parameter([[1.0]])
    optimizer = LARS([p, without], lr=0.0, weight_decay=0.0, clip=True, foreach=foreach)
    assert_values(after_step(p, optimizer, [[0.0, 2.0]]), [[3.0, 4.0]])
    assert_values(optimizer.state[p]["momentum_buffer"], [[0.0, 2.0]])
    assert without not in optimizer.state  # it has no gradient
    p.grad = None
    optimizer.step()


class ReferenceLARS:
    """vicreg@4e12602, main_vicreg.py, LARS, in numpy; biases and norms are those of one axis.

    With `clip`, solo-learn's solo/utils/lars.py with clip_lr, but for the denominator, which is
    the authors'.
    """

    def __init__(self, lr: float, weight_decay: float, *, clip: bool) -> None:
        self.lr, self.weight_decay, self.clip = lr, weight_decay, clip
        self.mu: dict[int, Array] = {}

    def step(self, params: list[Array], grads: list[Array]) -> None:
        for index, (p, grad) in enumerate(zip(params, grads, strict=True)):
            dp = grad.copy()
            if p.ndim != 1:
                dp = dp + self.weight_decay * p
                param_norm, update_norm = np.linalg.norm(p), np.linalg.norm(dp)
                if param_norm > 0 and update_norm > 0:
                    q = 0.02 * param_norm / update_norm
                    dp = dp * (min(q / self.lr, 1) if self.clip else q)
            self.mu[index] = 0.9 * self.mu.get(index, np.zeros_like(p)) + dp
            p -= self.lr * self.mu[index]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize(
    ("lr", "clip"),
    [(0.7, False), (1e-3, True), (0.02, True), (1.0, True)],  # all, some and none are clipped
)
def test_many_steps_match_the_authors_and_solo_learn(lr: float, clip: bool, foreach: Any) -> None:
    random = np.random.default_rng(0)
    shapes = ((4, 3), (4,), (2, 3, 5, 5), (1,))
    arrays = [k * random.normal(size=shape) for k, shape in zip((1, 1, 5, 1), shapes, strict=True)]
    arrays += [0.2 * random.normal(size=(4, 3)), np.zeros((3, 2))]
    params = [nn.Parameter(torch.from_numpy(array.copy())) for array in arrays]
    ours = LARS(params, lr, weight_decay=1e-2, eta=0.02, clip=clip, foreach=foreach)
    theirs = ReferenceLARS(lr, 1e-2, clip=clip)
    for _ in range(5):
        grads = [random.normal(size=array.shape) for array in arrays]
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(grad.copy())
        ours.step()
        theirs.step(arrays, grads)
    for p, array in zip(params, arrays, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), array, rtol=1e-12, atol=1e-14)


def test_groups_keep_their_own_settings_and_a_closure_gives_its_loss() -> None:
    slow, fast = parameter([1.0]), parameter([1.0])
    optimizer = LARS([{"params": [slow]}, {"params": [fast], "lr": 0.5}], lr=0.1)
    authors = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "eta": 1e-3}
    assert optimizer.defaults == authors | {"clip": False, "foreach": None}

    def closure() -> float:
        loss = (slow + fast).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert_values(torch.stack([slow, fast]).detach(), [[0.9], [0.5]])


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "eta"])
def test_lars_refuses_settings_that_cannot_be(name: str) -> None:
    settings: dict[str, Any] = {"lr": 0.1, name: -1.0}
    message = f"^{name} must be a finite number of at least 0, got -1.0.$"
    with pytest.raises(ValueError, match=message):
        LARS([parameter([1.0])], **settings)
    with pytest.raises(ValueError, match=message):  # also of a group
        LARS([{"params": [parameter([1.0])], name: -1.0}], lr=0.1)
    with pytest.raises(ValueError, match=r"momentum must be at most 1, got 1\.5"):
        LARS([parameter([1.0])], lr=0.1, momentum=1.5)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight", "grad", "expected"),
    [(1.0, 300.0, 0.75), (300.0, 1.0, 225.0)],
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


# Many parameters at once


def parameters_of_all_kinds() -> list[nn.Parameter]:
    """Some in two dtypes and three layouts, some zero, one without dimensions and one empty."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for dtype in (torch.float32, torch.float64)
        for shape in ((4, 3), (4,), (6, 3, 5, 5), (), (2, 0), (7, 2))
    ]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    tensors[5] = tensors[5].T
    tensors[8] = tensors[8][:, :, ::2]
    return [nn.Parameter(tensor) for tensor in [*tensors, torch.zeros(3, 2), torch.zeros(5)]]


@pytest.mark.parametrize("clip", [False, True])
def test_all_at_once_are_updated_as_one_by_one_with_the_same_state(clip: bool) -> None:
    """Gradients are missing for some parameters, and zero for others."""
    expected, params, start = (parameters_of_all_kinds() for _ in range(3))
    plain, together = (
        LARS(
            [{"params": own[1::3], "lr": 0.4, "eta": 0.05}, {"params": own[::3] + own[2::3]}],
            lr=0.7, weight_decay=1e-3, eta=0.02, clip=clip, foreach=foreach,
        )
        for own, foreach in ((expected, False), (params, True))
    )  # fmt: skip
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for index, (p, q) in enumerate(zip(expected, params, strict=True)):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            grad = grad * ((index + step) % 5 > 0)
            p.grad, q.grad = (None if (index + step) % 7 == 0 else grad.clone() for _ in "pq")
        plain.step()
        together.step()
    for p, q, before in zip(params, expected, start, strict=True):
        torch.testing.assert_close(p, q)  # to rounding: each step is a few operations
        torch.testing.assert_close(together.state[p], plain.state[q])
        assert p.stride() == before.stride()
        assert torch.equal(p, before) == (p.numel() == 0)


def test_a_step_of_all_at_once_waits_for_no_value() -> None:
    """On the meta device nothing has a value, so whatever asks for one fails."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((4, 3), (4,))]
    optimizer = LARS(params, lr=0.1, clip=True, foreach=True)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError):
        params[0].sum().item()


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
