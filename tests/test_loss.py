"""The loss against values worked by hand and against the authors' formulas in float64."""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_hf import VICRegLoss, covariance, vicreg_loss
from vicreg_hf.loss import VarianceReduction

SHAPES = [(6, 4), (5, 5), (4, 9)]  # N > D, N = D, N < D: both forms of the covariance term
LARGER_SHAPES = [(64, 32), (16, 16), (32, 64)]


class Terms(NamedTuple):
    """The reference's loss and its terms."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def authors_loss(
    x: Tensor,
    y: Tensor,
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean",
) -> Terms:
    """vicreg@4e12602, main_vicreg.py, VICReg.forward, written out; autograd differentiates it."""
    num_rows, dim = x.shape
    invariance = F.mse_loss(x, y)
    hinges, squares = [], []
    for branch in (x, y):
        centred = branch - branch.mean(dim=0)
        deviation = torch.sqrt(centred.var(dim=0) + eps)
        hinges.append(torch.mean(F.relu(gamma - deviation)))
        covariance = (centred.T @ centred) / (num_rows - 1)
        off_diagonal = covariance[~torch.eye(dim, dtype=torch.bool)]
        squares.append(off_diagonal.pow(2).sum() / dim)
    variance = hinges[0] + hinges[1]
    if variance_reduction == "mean":
        variance = variance / 2
    covariance = squares[0] + squares[1]
    total = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return Terms(total, invariance, variance, covariance)


def embeddings(rows: int, dim: int, *, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, z_prime = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64) * scale
    return z, z_prime


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def exact_gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the authors' formula in float64, at the very values of the inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return gradients(authors_loss(*exact).loss, *exact)


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


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (32, 64)])
def test_half_precision_under_autocast_is_computed_in_float32(
    rows: int, dim: int, dtype: torch.dtype, scale: float
) -> None:
    z, z_prime = (x.to(dtype) for x in embeddings(rows, dim, scale=scale))
    with torch.autocast("cpu", dtype=dtype):
        value = vicreg_loss(z, z_prime).loss
    assert value.dtype == torch.float32
    expected = authors_loss(z.double(), z_prime.double()).loss
    torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=0)


def far_embeddings(
    rows: int, dim: int, dtype: torch.dtype, *, mean: float, scale: float
) -> list[Tensor]:
    return [(x + mean).to(dtype).requires_grad_() for x in embeddings(rows, dim, scale=scale)]


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1e3), (1e3, 1e3), (1e3, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim"), LARGER_SHAPES)
def test_large_half_precision_embeddings_give_the_loss_and_gradients_of_float64(
    rows: int, dim: int, dtype: torch.dtype, mean: float, scale: float
) -> None:
    inputs = far_embeddings(rows, dim, dtype, mean=mean, scale=scale)
    value, limit = vicreg_loss(*inputs).loss, torch.finfo(dtype).max
    expected = authors_loss(*[x.detach().double() for x in inputs]).loss
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0)
    # Beyond the largest float16 a gradient is that, and not infinite.
    for actual, exact in zip(gradients(value, *inputs), exact_gradients(inputs), strict=True):
        assert actual.isfinite().all()
        exact = exact.clamp(-limit, limit)
        eps = torch.finfo(dtype).eps
        tolerance = 1e-5 * float(exact.abs().max())
        torch.testing.assert_close(actual.double(), exact, rtol=0.51 * eps, atol=tolerance)


@pytest.mark.parametrize(("scale", "infinite"), [(8.0, "some"), (1e3, "all")])
@pytest.mark.parametrize(("rows", "dim"), LARGER_SHAPES)
def test_float16_gradients_are_infinite_where_a_loss_scale_takes_them_beyond_float16(
    rows: int, dim: int, scale: float, infinite: str
) -> None:
    inputs = far_embeddings(rows, dim, torch.float16, mean=0.0, scale=scale)
    scaled = gradients(vicreg_loss(*inputs).loss * 65536, *inputs)
    for actual, exact in zip(scaled, exact_gradients(inputs), strict=True):
        expected = (exact * 65536).half()
        assert expected.isinf().any()
        assert bool(expected.isfinite().any()) == (infinite == "some")
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1.0)


def test_a_gradient_scaler_lowers_its_scale_until_the_gradients_fit_and_then_steps() -> None:
    z, z_prime = (x.float() for x in embeddings(32, 64, scale=8.0))
    start, z = z.clone().requires_grad_(), z.requires_grad_()
    optimizer, scaler = torch.optim.SGD([z], lr=0.1), torch.amp.GradScaler("cpu")
    (exact,) = gradients(vicreg_loss(start.half(), z_prime.half()).loss, start)
    skipped = 0
    while torch.equal(z, start):
        assert scaler.get_scale() == 65536 / 2**skipped
        optimizer.zero_grad()
        scaler.scale(vicreg_loss(z.half(), z_prime.half()).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += 1
    skipped -= 1
    assert 0 < skipped < 16
    assert scaler.get_scale() == 65536 / 2**skipped
    torch.testing.assert_close(start - z, 0.1 * exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    z, z_prime = (x.to(dtype).requires_grad_() for x in embeddings(8, 16))
    grads = gradients(vicreg_loss(z, z_prime).loss, z, z_prime)
    assert [grad.dtype for grad in grads] == [dtype, dtype]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float16),
    ],
)
@pytest.mark.parametrize(("rows", "dim"), LARGER_SHAPES)
def test_branches_of_different_dtypes_get_gradients_of_their_own(
    rows: int, dim: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    branches = zip(embeddings(rows, dim), dtypes, strict=True)
    inputs = [x.to(dtype).requires_grad_() for x, dtype in branches]
    ours, theirs = vicreg_loss(*inputs), authors_loss(*[x.detach().double() for x in inputs])
    torch.testing.assert_close(ours.loss.double(), theirs.loss, rtol=1e-5, atol=0)
    for x, actual, exact in zip(
        inputs, gradients(ours.loss, *inputs), exact_gradients(inputs), strict=True
    ):
        assert actual.dtype == x.dtype
        tolerance = 1e-5 * float(exact.abs().max())
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(actual.double(), exact, rtol=0.51 * eps, atol=tolerance)


@pytest.mark.parametrize("top", [1.0, 30.0, 1e3])
@pytest.mark.parametrize(("rows", "dim"), [(64, 48), (64, 256)])
def test_float32_agrees_with_float64_where_one_dimension_dominates(
    rows: int, dim: int, top: float
) -> None:
    z, z_prime = embeddings(rows, dim)
    z[:, 0] *= top
    z_prime[:, 0] *= top
    value = vicreg_loss(z.float(), z_prime.float()).covariance
    expected = authors_loss(z, z_prime).covariance
    torch.testing.assert_close(value, expected.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0])  # below the hinge, and around it
@pytest.mark.parametrize(("rows", "dim"), [(300, 700), (700, 300)])
def test_float32_agrees_with_float64_beyond_one_stripe_of_the_product(
    rows: int, dim: int, scale: float
) -> None:
    assert min(rows, dim) > covariance.STRIPE_ROWS["cpu"]
    inputs = [x.float().requires_grad_() for x in embeddings(rows, dim, scale=scale)]
    ours, theirs = vicreg_loss(*inputs), authors_loss(*[x.detach().double() for x in inputs])
    for name in Terms._fields:
        expected = getattr(theirs, name).float()
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-5, atol=0)
    for actual, exact in zip(gradients(ours.loss, *inputs), exact_gradients(inputs), strict=True):
        tolerance = 1e-5 * float(exact.abs().max())
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("shape", [(2**11, 2**13), (2**18, 64), (2**24, 1)])
def test_sums_of_squares_of_many_float32_entries_are_accurate(
    shape: tuple[int, int], mean: float
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    squares = x.double().square()
    for dim in (None, 0):
        actual = covariance.sum_of_squares(x, dim).double()
        torch.testing.assert_close(actual, squares.sum(dim), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize(
    ("z", "z_prime", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), r"\(4, 3\) and \(4, 2\)"),
        (torch.zeros(4, 3), torch.zeros(3, 3), r"\(4, 3\) and \(3, 3\)"),
        (torch.zeros(4), torch.zeros(4), r"\(rows, dimensions\)"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), r"\(rows, dimensions\)"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 3).long(), "floating point"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), "floating point"),
        (torch.zeros(1, 3), torch.zeros(1, 3), "at least 2 rows over all processes, got 1"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "at least 2 rows over all processes, got 0"),
        (torch.zeros(4, 0), torch.zeros(4, 0), r"at least 1 dimension, got shape \(4, 0\)"),
        (np.zeros((4, 3)), torch.zeros(4, 3), "must be tensors, got ndarray and Tensor; convert"),
        ([[0.0], [1.0]], None, "must be tensors, got list and NoneType; convert arrays"),
        (torch.zeros(4, 3), torch.zeros(4, 3, device="meta"), "same device, got cpu and meta"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(z: Any, z_prime: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicreg_loss(z, z_prime)


def test_an_unknown_variance_reduction_is_refused() -> None:
    reduction: Any = "median"
    with pytest.raises(ValueError, match="mean or sum, got 'median'"):
        vicreg_loss(*embeddings(4, 3), variance_reduction=reduction)
    with pytest.raises(ValueError, match="mean or sum, got 'median'"):
        VICRegLoss(variance_reduction=reduction)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True, torch.ones(())])
@pytest.mark.parametrize("name", ["sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps"])
def test_weights_and_constants_that_cannot_be_are_refused(name: str, value: Any) -> None:
    message = f"^{name} must be a finite number of at least 0, got {re.escape(repr(value))}.$"
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=message):
        VICRegLoss(**settings)
    with pytest.raises(ValueError, match=message):
        vicreg_loss(*embeddings(4, 3), **settings)


def test_numbers_may_be_integers_and_those_of_numpy() -> None:
    z, z_prime = embeddings(6, 4)
    given: Any = {"sim_coeff": np.float32(2), "std_coeff": np.int64(3), "cov_coeff": 5}
    expected = vicreg_loss(z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0)
    assert torch.equal(vicreg_loss(z, z_prime, **given).loss, expected.loss)


def test_the_module_shows_its_settings() -> None:
    assert repr(VICRegLoss(2.0, variance_reduction="sum")) == (
        "VICRegLoss(sim_coeff=2.0, std_coeff=25.0, cov_coeff=1.0, gamma=1.0, eps=0.0001, "
        "variance_reduction=sum)"
    )


def test_the_module_computes_the_function_with_its_settings() -> None:
    z, z_prime = embeddings(6, 4, scale=0.5)
    module = VICRegLoss(2.0, 3.0, 5.0, gamma=1.5, eps=1e-3, variance_reduction="sum")
    expected = authors_loss(
        z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0, gamma=1.5, eps=1e-3,
        variance_reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(tuple(module(z, z_prime)), tuple(expected))
