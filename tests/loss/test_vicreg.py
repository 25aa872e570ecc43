"""The loss against values worked by hand and against the authors' formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from authors_loss import SHAPES, Terms, authors_loss, embeddings, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_hf import vicreg_loss


def assert_same_loss_and_gradients(z: Tensor, z_prime: Tensor, **settings: Any) -> None:
    """`vicreg_loss` and the authors' formulas agree to 1e-10 of the size of each."""
    inputs = [x.detach().clone().requires_grad_() for x in (z, z_prime)]
    ours, theirs = vicreg_loss(*inputs, **settings), authors_loss(*inputs, **settings)
    for name in Terms._fields:
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-13, check_dtype=True
        )
    theirs_grads = gradients(theirs.loss, *inputs)
    size = max(float(grad.abs().max()) for grad in theirs_grads)
    torch.testing.assert_close(
        gradients(ours.loss, *inputs), theirs_grads, rtol=0, atol=1e-10 * size + 1e-13
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], 16.00),  # no hinge; 2 views * 6 pairs * 2**2 / 3
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 24.75),  # collapsed: 25 * (1 - sqrt(1e-4))
        ([[1.0], [3.0]], 0.00),  # one dimension of variance 2: nothing to correlate with
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], 25 * (1 - (2 / 3 + 1e-4) ** 0.5)),
    ],
)
def test_loss_of_equal_views_matches_values_worked_by_hand(
    rows: list[list[float]], expected: float
) -> None:
    z = torch.tensor(rows)
    torch.testing.assert_close(vicreg_loss(z, z).loss, torch.tensor(expected))


def test_terms_match_values_worked_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, 4.0], [4.0, 2.0]])
    z_prime = torch.tensor([[1.0, 0.0], [1.0, 3.0], [4.0, 0.0]])
    terms = vicreg_loss(z, z_prime)
    # differences 1, 1, 1, 1, 0, 2 -> (1 + 0 + 1 + 1 + 0 + 4) / 6
    torch.testing.assert_close(terms.invariance, torch.tensor(7 / 6))
    # variances 4, 4, 3, 3: no hinge
    torch.testing.assert_close(terms.variance, torch.tensor(0.0))
    # covariances 2 and -1.5: (2 * 2**2 + 2 * 1.5**2) / 2
    torch.testing.assert_close(terms.covariance, torch.tensor(6.25))
    torch.testing.assert_close(terms.loss, torch.tensor(25 * 7 / 6 + 6.25))


@given(
    rows=st.integers(2, 12),
    dim=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
    coefficients=st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100)),
    gamma=st.floats(0.1, 3),
    eps=st.floats(1e-6, 1e-1),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_any_embeddings_and_settings_give_the_authors_loss_and_gradients(
    rows: int, dim: int, seed: int, scale: float, coefficients: tuple[float, float, float],
    gamma: float, eps: float, reduction: str,
) -> None:  # fmt: skip
    sim, std, cov = coefficients
    assert_same_loss_and_gradients(
        *embeddings(rows, dim, seed=seed, scale=scale), sim_coeff=sim, std_coeff=std,
        cov_coeff=cov, gamma=gamma, eps=eps, variance_reduction=reduction,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "dim"), [*SHAPES, (2, 1), (2, 2), (2, 7)])
@pytest.mark.parametrize("kind", ["all rows equal", "rows in pairs", "one dimension constant"])
def test_degenerate_embeddings_give_the_authors_loss_and_gradients(
    rows: int, dim: int, kind: str
) -> None:
    z, z_prime = embeddings(rows, dim)
    for branch in (z, z_prime):
        if kind == "all rows equal":
            branch[:] = branch[0]
        elif kind == "rows in pairs":
            branch[1::2] = branch[: rows - 1 : 2]
        else:
            branch[:, 0] = 0.7
    assert_same_loss_and_gradients(z, z_prime)


class LargestOutput(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "dim"), [(64, 512), (512, 64), (500, 512), (512, 500), (512, 512)]
)
def test_no_tensor_exceeds_the_embeddings_and_the_smaller_product(
    rows: int, dim: int, dtype: torch.dtype
) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in embeddings(rows, dim)]
    with LargestOutput() as forward:
        value = vicreg_loss(*inputs).loss
    with LargestOutput() as backward:
        gradients(value, *inputs)
    assert forward.elements == rows * dim  # or else the operators were not seen
    assert backward.elements == rows * dim
    with LargestOutput() as theirs:
        authors_loss(*[x.float() for x in inputs])
    assert theirs.elements >= dim**2
