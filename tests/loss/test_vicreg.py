"""All losses against values worked by hand, the authors' formulas and the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from authors_loss import SHAPES, authors_loss, embeddings, gradients, plain_loss, views_of
from hypothesis import given
from hypothesis import strategies as st
from largest_output import LargestOutput
from scipy.linalg import hadamard
from torch import Tensor

from vicreg_hf import covariance_term, multi_view_loss, variance_term, vicreg_loss
from vicreg_hf.loss import covariance


def assert_same_loss_and_gradients(z: Tensor, z_prime: Tensor, **settings: Any) -> None:
    """`vicreg_loss` and the authors' formulas agree to 1e-10 of the size of each."""
    inputs = [x.detach().clone().requires_grad_() for x in (z, z_prime)]
    ours, theirs = vicreg_loss(*inputs, **settings), authors_loss(*inputs, **settings)
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-10, atol=1e-13)
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
def test_loss_of_equal_views_matches_values_worked_by_hand(rows: Any, expected: float) -> None:
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


ANY_SETTINGS = st.fixed_dictionaries({
    **dict.fromkeys(("sim_coeff", "std_coeff", "cov_coeff"), st.floats(0, 100)),
    "gamma": st.floats(0.1, 3), "eps": st.floats(1e-6, 1e-1),
    "variance_reduction": st.sampled_from(["mean", "sum"]),
})  # fmt: skip


@given(
    shape=st.tuples(st.integers(2, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
    settings=ANY_SETTINGS,
)
def test_any_embeddings_and_settings_give_the_authors_loss_and_gradients(
    shape: tuple[int, int], seed: int, scale: float, settings: dict[str, Any]
) -> None:
    assert_same_loss_and_gradients(*embeddings(*shape, seed=seed, scale=scale), **settings)


DEGENERATE: dict[str, Any] = {
    "all rows equal": lambda z: z[:1].expand_as(z),
    "rows in pairs": lambda z: z.repeat_interleave(2, 0)[: len(z)],
    "one dimension constant": lambda z: torch.cat([torch.full_like(z[:, :1], 0.7), z[:, 1:]], 1),
}


@pytest.mark.parametrize(("rows", "dim"), [*SHAPES, (2, 1), (2, 2), (2, 7)])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_embeddings_give_the_authors_loss_and_gradients(
    rows: int, dim: int, kind: str
) -> None:
    assert_same_loss_and_gradients(*map(DEGENERATE[kind], embeddings(rows, dim)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), [(64, 512), (512, 64), (500, 512), (512, 500)])
def test_no_tensor_exceeds_the_embeddings_and_the_smaller_product(
    rows: int, dim: int, dtype: torch.dtype
) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in embeddings(rows, dim)]
    with LargestOutput() as largest:
        gradients(vicreg_loss(*inputs).loss, *inputs)
    assert largest.elements == rows * dim  # or else the operators were not seen
    with LargestOutput() as theirs:
        authors_loss(*[x.float() for x in inputs])
    assert theirs.elements >= dim**2


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
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-12, atol=1e-13)
    assert [term.requires_grad for term in actual] == [True, False, False, False]
    grads, right = (torch.autograd.grad(terms.loss, views) for terms in (actual, expected))
    torch.testing.assert_close(grads, right, rtol=1e-11, atol=1e-13)


def test_terms_of_many_views_match_values_worked_by_hand() -> None:
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


def test_single_terms_match_values_worked_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0, 5.0], [2.0, 4.0, 5.0], [4.0, 2.0, 5.0]])
    # variances 4, 4, 0: only the last lacks, 1 - sqrt(1e-4); the one covariance is 2
    torch.testing.assert_close(variance_term(z), torch.tensor(0.99 / 3))
    torch.testing.assert_close(variance_term(z, gamma=3.0, eps=0.0), torch.tensor(5 / 3))
    torch.testing.assert_close(covariance_term(z), torch.tensor(2 * 2**2 / 3))


def test_rounding_leaves_the_covariance_term_at_zero_or_above() -> None:
    x = torch.zeros(128, 200)  # the Gram form takes off all that there is
    x[:, :127] = torch.from_numpy(hadamard(128)[:, 1:].copy()).float()
    assert -1e-3 < covariance.analyse(x, len(x), len(x), None)[1].item() < 0
    assert covariance_term(x).item() == 0
    terms = vicreg_loss(x, x, sim_coeff=0.0, std_coeff=0.0)
    assert (terms.covariance.item(), terms.loss.item()) == (0, 0)
