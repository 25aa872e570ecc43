"""LARS that steps many parameters at once, against the one that takes each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vicreg_hf.training.building.optimizers import LARS


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


def test_on_a_cpu_lars_is_the_plain_one_to_the_last_bit() -> None:
    plain, default = parameters_of_all_kinds(), parameters_of_all_kinds()
    take_steps(plain, lars_of(plain, foreach=False), range(4))
    take_steps(default, lars_of(default), range(4))
    assert all(map(torch.equal, default, plain))
