"""Many views against values worked by hand, the definition, and `vicreg_loss`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from authors_loss import SHAPES, Terms, plain_loss, views_of

from vicreg_hf import multi_view_loss, vicreg_loss

SETTINGS: dict[str, Any] = {
    "sim_coeff": 3.0, "std_coeff": 5.0, "cov_coeff": 2.0, "gamma": 1.2, "eps": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 1), (2, 6), (3, 0), (3, 2)])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_terms_and_gradients_are_those_of_the_definition(
    rows: int, dim: int, num_global: int, num_local: int, reduction: Any
) -> None:
    views = views_of(num_global + num_local, rows, dim)
    settings: Any = SETTINGS | {"variance_reduction": reduction}
    actual = multi_view_loss(views[:num_global], views[num_global:], **settings)
    expected = plain_loss(views, num_global, **settings)
    for name in Terms._fields:
        value, wanted = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-13)
        assert value.requires_grad == (name == "loss")
    grads, right = (torch.autograd.grad(terms.loss, views) for terms in (actual, expected))
    torch.testing.assert_close(grads, right, rtol=1e-11, atol=1e-13)


def test_terms_match_values_worked_by_hand() -> None:
    first, second = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [4.0]])
    local = [torch.tensor([[0.0], [6.0]]), torch.tensor([[0.0], [0.0]])]
    terms = multi_view_loss([first, second], local, sim_coeff=1.0, eps=0.0)
    # squared differences / 2: the global pair 1/2; first to local 4/2, 16/2; second 5/2, 17/2;
    # between the local ones 36/2, which does not count
    torch.testing.assert_close(terms.invariance, torch.tensor((1 + 4 + 16 + 5 + 17) / 2 / 5))
    torch.testing.assert_close(terms.variance, torch.tensor(1 / 4))  # the last view's hinge alone
    assert terms.covariance == 0  # one dimension


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_two_global_views_give_vicreg_loss_to_the_last_bit(
    rows: int, dim: int, dtype: torch.dtype
) -> None:
    views = views_of(2, rows, dim, dtype=dtype)
    actual, expected = multi_view_loss(views, **SETTINGS), vicreg_loss(*views, **SETTINGS)
    assert all(map(torch.equal, actual, expected))
    grads, right = (torch.autograd.grad(terms.loss, views) for terms in (actual, expected))
    assert all(map(torch.equal, grads, right))
