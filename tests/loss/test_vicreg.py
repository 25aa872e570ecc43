"""The loss against values worked by hand and against the authors' formulas in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from authors_loss import SHAPES, Terms, authors_loss, embeddings, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_hf import vicreg_loss
from vicreg_hf.loss import covariance


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


def test_summed_variance_is_twice_the_mean_over_branches() -> None:
    z = torch.zeros(2, 3)
    terms = vicreg_loss(z, z, variance_reduction="sum")
    torch.testing.assert_close(terms.variance, torch.tensor(2 * 0.99))


def test_coefficients_weigh_their_own_terms() -> None:
    z, z_prime = embeddings(6, 4, scale=0.5)
    terms = vicreg_loss(z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0)
    expected = 2 * terms.invariance + 3 * terms.variance + 5 * terms.covariance
    torch.testing.assert_close(terms.loss, expected)


@given(
    rows=st.integers(2, 12),
    dim=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_random_embeddings_give_the_authors_loss_and_gradients(
    rows: int, dim: int, seed: int, scale: float, reduction: str
) -> None:
    z, z_prime = embeddings(rows, dim, seed=seed, scale=scale)
    assert_same_loss_and_gradients(z, z_prime, variance_reduction=reduction)


@given(
    rows=st.integers(2, 6),
    dim=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    coefficients=st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100)),
    gamma=st.floats(0.1, 3),
    eps=st.floats(1e-6, 1e-1),
)
def test_any_settings_give_the_authors_loss_and_gradients(
    rows: int,
    dim: int,
    seed: int,
    coefficients: tuple[float, float, float],
    gamma: float,
    eps: float,
) -> None:
    sim, std, cov = coefficients
    assert_same_loss_and_gradients(
        *embeddings(rows, dim, seed=seed),
        sim_coeff=sim, std_coeff=std, cov_coeff=cov, gamma=gamma, eps=eps,
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


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_gradients_match_finite_differences(rows: int, dim: int) -> None:
    inputs = [x.requires_grad_() for x in embeddings(rows, dim, scale=0.7)]
    assert torch.autograd.gradcheck(lambda *x: vicreg_loss(*x).loss, inputs)


@pytest.mark.parametrize("block_elements", [1, 23])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_work_in_blocks_gives_the_same_loss_and_gradients(
    rows: int, dim: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(covariance.BLOCK_ELEMENTS, "cpu", block_elements)
    monkeypatch.setitem(covariance.STRIPE_ROWS, "cpu", 1 + block_elements // 8)
    assert_same_loss_and_gradients(*embeddings(rows, dim))


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_one_branch_alone_gets_the_gradient_it_gets_beside_the_other(
    rows: int, dim: int, branch: int
) -> None:
    both = [x.requires_grad_() for x in embeddings(rows, dim)]
    expected = gradients(vicreg_loss(*both).loss, *both)[branch]
    alone = [x.detach().requires_grad_(index == branch) for index, x in enumerate(both)]
    (actual,) = gradients(vicreg_loss(*alone).loss, alone[branch])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_one_tensor_as_both_branches_gets_the_sum_of_their_gradients(rows: int, dim: int) -> None:
    z = embeddings(rows, dim)[0].requires_grad_()
    torch.testing.assert_close(
        gradients(vicreg_loss(z, z).loss, z), gradients(authors_loss(z, z).loss, z)
    )


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_embeddings_are_left_as_they_were(rows: int, dim: int) -> None:
    z, z_prime = embeddings(rows, dim)
    before = z.clone(), z_prime.clone()
    vicreg_loss(z, z_prime)
    assert torch.equal(z, before[0])
    assert torch.equal(z_prime, before[1])


def test_a_scaled_loss_scales_its_gradients() -> None:
    inputs = [x.requires_grad_() for x in embeddings(4, 9)]
    once = gradients(vicreg_loss(*inputs).loss, *inputs)
    scaled = gradients(vicreg_loss(*inputs).loss * 1024, *inputs)
    torch.testing.assert_close(scaled, tuple(grad * 1024 for grad in once), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_backward_through_a_retained_graph_gives_the_same_gradients_again(
    rows: int, dim: int, dtype: torch.dtype
) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in embeddings(rows, dim)]
    value = vicreg_loss(*inputs).loss
    first, second = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
    last = gradients(value, *inputs)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, last))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(value, *inputs)


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_gradients_add_up_over_two_losses_of_the_same_embeddings(rows: int, dim: int) -> None:
    inputs = [x.requires_grad_() for x in embeddings(rows, dim)]
    expected = gradients(authors_loss(*inputs).loss, *inputs)
    vicreg_loss(*inputs).loss.backward()
    vicreg_loss(*inputs).loss.backward()
    for x, grad in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, 2 * grad)


VIEWS = {
    "transposed": lambda x: x.T.contiguous().T,
    "some rows and columns": lambda x: F.pad(x, (1, 2, 3, 1), value=7.0)[3:-1, 1:-2],
    "every second row, backwards in memory": lambda x: x.repeat_interleave(2, 0).flip(0)[::2],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_views_that_are_not_contiguous_give_the_authors_loss_and_gradients(
    rows: int, dim: int, kind: str
) -> None:
    inputs = [x.requires_grad_() for x in embeddings(rows, dim)]
    views = [VIEWS[kind](x) for x in inputs]
    assert not any(view.is_contiguous() for view in views)
    ours, theirs = vicreg_loss(*views), authors_loss(*views)
    torch.testing.assert_close(tuple(ours), tuple(theirs))
    theirs_grads = gradients(theirs.loss, *inputs)
    torch.testing.assert_close(gradients(ours.loss, *inputs), theirs_grads)


@pytest.mark.parametrize(
    "without_gradients", [torch.enable_grad(), torch.no_grad(), torch.inference_mode()]
)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_without_gradients_the_loss_is_the_same(
    rows: int, dim: int, without_gradients: AbstractContextManager
) -> None:
    inputs = embeddings(rows, dim)
    expected = authors_loss(*inputs)
    with without_gradients:
        terms = vicreg_loss(*inputs)
    assert not terms.loss.requires_grad
    torch.testing.assert_close(tuple(terms), tuple(expected))


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


def test_only_the_loss_carries_a_gradient() -> None:
    terms = vicreg_loss(*[x.requires_grad_() for x in embeddings(6, 4)])
    assert [term.requires_grad for term in terms] == [True, False, False, False]


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_second_order_gradients_are_refused_and_not_silently_left_out(rows: int, dim: int) -> None:
    z, z_prime = (x.requires_grad_() for x in embeddings(rows, dim))
    value = vicreg_loss(z, z_prime).loss

    def gradient_of_a_gradient_penalty() -> None:
        (grad,) = torch.autograd.grad(value, z, create_graph=True)
        (value + grad.square().sum()).backward()

    with pytest.raises(RuntimeError):
        gradient_of_a_gradient_penalty()
