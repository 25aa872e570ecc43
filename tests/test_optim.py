"""LARS and the learning rate against steps worked by hand and the authors' formulas."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from vicreg_hf.optim import LARS, create_optimizer, default_base_lr, learning_rate
from vicreg_hf.snapshots import join_tensors, split_tensors

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


def lars_of(params: list[nn.Parameter], **settings: Any) -> LARS:
    fast = {"params": params[1::3], "lr": 0.4, "eta": 0.05, "weight_decay": 0.3}
    rest = [p for index, p in enumerate(params) if index % 3 != 1]
    return LARS([{"params": rest}, fast], lr=0.7, weight_decay=1e-3, eta=0.02, **settings)


def take_steps(params: list[nn.Parameter], optimizer: LARS, steps: range) -> None:
    """With gradients of which some are missing, some zero, and some in another layout."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if (index + step) % 5 == 0:
                grad = torch.zeros_like(p)
            p.grad = None if (index + step) % 7 == 0 else grad
        optimizer.step()


@pytest.mark.parametrize("clip", [False, True])
def test_lars_at_once_is_the_plain_one_to_rounding(clip: bool) -> None:
    plain, together = parameters_of_all_kinds(), parameters_of_all_kinds()
    take_steps(plain, lars_of(plain, clip=clip, foreach=False), range(6))
    take_steps(together, lars_of(together, clip=clip, foreach=True), range(6))
    for actual, expected, before in zip(together, plain, parameters_of_all_kinds(), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == before.stride()
    moved = [not torch.equal(p, q) for p, q in zip(plain, parameters_of_all_kinds(), strict=True)]
    assert moved == [p.numel() > 0 for p in plain]


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_either_lars_goes_on_from_the_others_state(before: bool, after: bool) -> None:
    expected, params = parameters_of_all_kinds(), parameters_of_all_kinds()
    take_steps(expected, lars_of(expected, foreach=before), range(6))
    first = lars_of(params, foreach=before)
    take_steps(params, first, range(3))
    state = first.state_dict()
    for group in state["param_groups"]:
        group["foreach"] = after
    second = lars_of(params, foreach=after)
    second.load_state_dict(state)
    take_steps(params, second, range(3, 6))
    tolerance: Any = {"rtol": 0, "atol": 0} if before == after else {}
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p, value, **tolerance)


@pytest.mark.parametrize("foreach", [False, True])
def test_lars_without_any_gradient_moves_nothing(foreach: bool) -> None:
    p = parameter([[3.0, 4.0]])
    LARS([p], lr=0.5, weight_decay=0.1, foreach=foreach).step()
    assert_values(p.detach(), [[3.0, 4.0]])


def test_on_a_cpu_lars_is_the_plain_one_to_the_last_bit() -> None:
    plain, default = parameters_of_all_kinds(), parameters_of_all_kinds()
    take_steps(plain, lars_of(plain, foreach=False), range(4))
    take_steps(default, lars_of(default), range(4))
    assert all(map(torch.equal, default, plain))


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
