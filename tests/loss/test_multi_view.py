"""Many views against the terms written plainly in float64, and two views against `vicreg_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from vicreg_hf import multi_view_loss, vicreg_loss
from vicreg_hf.loss import autograd as terms

SHAPES = [(6, 4), (5, 5), (4, 9)]  # N > D, N = D, N < D: both forms of the covariance term
COUNTS = [(2, 1), (2, 6), (3, 0), (3, 2), (5, 0)]  # global and local views
NAMES = ["loss", "invariance", "variance", "covariance"]


def plain_views_loss(
    views: Sequence[Tensor],
    num_global: int,
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: str = "mean",
) -> dict[str, Tensor]:
    """The definition, pair by pair and view by view; autograd differentiates it."""
    numbered = combinations(enumerate(views), 2)
    errors = [F.mse_loss(a, b) for (i, a), (_, b) in numbered if i < num_global]
    hinges, squares = [], []
    for z in views:
        hinges.append(F.relu(gamma - torch.sqrt(z.var(dim=0) + eps)).mean())
        matrix = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
        squares.append((matrix - matrix.diag().diag()).square().sum() / z.shape[1])
    invariance = torch.stack(errors).mean()
    variance = torch.stack(hinges).mean() * (1 if variance_reduction == "mean" else 2)
    covariance = torch.stack(squares).mean() * 2
    loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return dict(zip(NAMES, [loss, invariance, variance, covariance], strict=True))


def views_of(
    count: int, rows: int, dim: int, *, dtype: torch.dtype = torch.float64, mean: float = 0.3
) -> list[Tensor]:
    """Views that resemble each other, not centred, with a spread around the hinge."""
    generator = torch.Generator().manual_seed(0)
    shared, *noise = torch.randn(1 + count, rows, dim, generator=generator, dtype=torch.float64)
    return [(0.8 * shared + 0.5 * x + mean).to(dtype).requires_grad_() for x in noise]


def split(views: list[Tensor], num_global: int) -> tuple[list[Tensor], list[Tensor]]:
    return views[:num_global], views[num_global:]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("counts", [*COUNTS, (2, 0)])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_loss_and_gradients_are_those_of_the_definition(
    rows: int, dim: int, counts: tuple[int, int], reduction: Any
) -> None:
    views = views_of(sum(counts), rows, dim)
    settings: Any = {"sim_coeff": 3.0, "std_coeff": 5.0, "cov_coeff": 2.0, "gamma": 1.2,
                     "eps": 1e-3, "variance_reduction": reduction}  # fmt: skip
    actual = multi_view_loss(*split(views, counts[0]), **settings)
    expected = plain_views_loss(views, counts[0], **settings)
    for name in NAMES:
        torch.testing.assert_close(getattr(actual, name), expected[name], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(actual.loss, views),
        torch.autograd.grad(expected["loss"], views),
        rtol=1e-11,
        atol=1e-13,
    )


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
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_two_global_views_give_vicreg_loss_to_the_last_bit(
    rows: int, dim: int, reduction: Any, dtype: torch.dtype
) -> None:
    views = views_of(2, rows, dim, dtype=dtype)
    settings: Any = {"sim_coeff": 3.0, "std_coeff": 5.0, "cov_coeff": 2.0, "gamma": 1.2,
                     "eps": 1e-3, "variance_reduction": reduction}  # fmt: skip
    actual, expected = multi_view_loss(views, **settings), vicreg_loss(*views, **settings)
    assert all(map(torch.equal, actual, expected))
    grads, expected_grads = (torch.autograd.grad(t.loss, views) for t in (actual, expected))
    assert all(map(torch.equal, grads, expected_grads))


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_only_views_that_require_a_gradient_get_one_and_it_is_the_same(rows: int, dim: int) -> None:
    views = views_of(4, rows, dim)
    expected = torch.autograd.grad(multi_view_loss(*split(views, 2)).loss, views)
    fewer = [x.detach().requires_grad_(index in (1, 2)) for index, x in enumerate(views)]
    terms = multi_view_loss(*split(fewer, 2))
    assert [term.requires_grad for term in terms] == [True, False, False, False]
    terms.loss.backward()
    assert [x.grad is None for x in fewer] == [True, False, False, True]
    for index in (1, 2):
        torch.testing.assert_close(fewer[index].grad, expected[index], rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_one_tensor_as_several_views_gets_the_sum_of_their_gradients(rows: int, dim: int) -> None:
    z, other = views_of(2, rows, dim)
    views = [z, other, z]
    actual = torch.autograd.grad(multi_view_loss(views).loss, [z, other])
    expected = torch.autograd.grad(plain_views_loss(views, 3)["loss"], [z, other])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (32, 64)])
def test_lower_precision_under_autocast_is_computed_in_float32(
    rows: int, dim: int, mean: float, dtype: torch.dtype
) -> None:
    views = views_of(5, rows, dim, dtype=dtype, mean=mean)
    with torch.autocast("cpu", torch.bfloat16):
        terms = multi_view_loss(*split(views, 2))
    assert terms.loss.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in views]
    expected = plain_views_loss(exact, 2)
    for name in NAMES:
        wanted = expected[name].float()
        torch.testing.assert_close(getattr(terms, name), wanted, rtol=2e-5, atol=0)
    grads, wanted = torch.autograd.grad(terms.loss, views), torch.autograd.grad(
        expected["loss"], exact
    )  # fmt: skip
    for grad, right in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype
        size = float(right.abs().max())
        rtol = 0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 0
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=2e-5 * size)


def test_views_of_different_dtypes_get_gradients_of_their_own() -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    pairs = zip(views_of(3, 6, 4), dtypes, strict=True)
    views = [x.detach().to(dtype).requires_grad_() for x, dtype in pairs]
    terms = multi_view_loss(views)
    assert [x.dtype for x in torch.autograd.grad(terms.loss, views)] == dtypes
    expected = plain_views_loss([x.detach().double() for x in views], 3)["loss"]
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), [(6, 4), (4, 9)])
def test_compiled_as_one_graph_it_is_the_eager_loss_to_the_last_bit(
    rows: int, dim: int, dtype: torch.dtype, dynamic: bool
) -> None:
    torch.compiler.reset()
    views = views_of(5, rows, dim, dtype=dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(multi_view_loss, fullgraph=True, backend=counter, dynamic=dynamic)
    actual, expected = compiled(*split(views, 2)), multi_view_loss(*split(views, 2))
    assert counter.frame_count > 0
    assert all(map(torch.equal, actual, expected))
    grads, expected_grads = (torch.autograd.grad(3 * t.loss, views) for t in (actual, expected))
    assert all(map(torch.equal, grads, expected_grads))


@pytest.mark.parametrize(("rows", "dim"), [(6, 4), (4, 9)])
def test_compiled_without_gradients_it_is_the_eager_loss_too(rows: int, dim: int) -> None:
    torch.compiler.reset()
    views = [view.detach() for view in views_of(5, rows, dim)]
    compiled: Any = torch.compile(multi_view_loss, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*split(views, 2)), multi_view_loss(*split(views, 2))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize("needed", [[True, True, True], [True, False, True]])
@pytest.mark.parametrize(("rows", "dim"), [(6, 4), (4, 9)])
def test_the_compiler_is_told_the_true_shapes_and_that_no_input_changes(
    rows: int, dim: int, needed: list[bool], product: bool
) -> None:
    views = [x.detach() for x in views_of(3, rows, dim, dtype=torch.float16)]
    settings = [25.0, 25.0, 1.0, 1.0, 1e-4, 0.5]
    forward = (views, 2, product, settings, "")
    value, _, _, _, *saved = terms._forward_op(*forward)
    backward = (torch.ones_like(value), views, saved, needed, 2, settings, "")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(terms._forward_op, forward, test_utils=checks)
    torch.library.opcheck(terms._backward_op, backward, test_utils=checks)


def test_a_retained_graph_gives_the_same_gradients_again_and_then_no_more() -> None:
    views = views_of(3, 4, 9)
    value = multi_view_loss(views).loss
    first = torch.autograd.grad(value, views, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, views)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, views)


def test_second_derivatives_are_refused() -> None:
    views = views_of(3, 4, 9)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(multi_view_loss(views).loss, views, create_graph=True)


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("global_views", "local_views", "message"),
    [
        ([], [], "at least 2 views, got 0"),
        ([Z], [Z, Z], "at least 2 views, got 1"),
        (
            [Z, Z],
            [Z[:2]],
            r"same shape \(rows, dimensions\), got \(4, 3\) and \(4, 3\) and \(2, 3\)",
        ),
        (
            [Z[0], Z[0], Z[0]],
            [],
            r"same shape \(rows, dimensions\), got \(3,\) and \(3,\) and \(3,\)",
        ),
        ([Z, Z, Z.long()], [], "floating point, got torch.float32 and torch.float32 and torch.int"),
        ([Z[:1]] * 3, [], "at least 2 rows over all processes, got 1"),
        (Z, Z, r"^global_views must be a list of tensors .*, got Tensor of shape \(4, 3\)\.$"),
        ((z for z in [Z, Z]), [], "^global_views must be a list of tensors .*, got generator"),
        (None, [], "^global_views must be a list of tensors .*, got NoneType"),
        ([Z, Z], Z, r"^local_views must be a list of tensors .*, got Tensor of shape \(4, 3\)"),
        ([Z, Z.numpy()], [], "must be tensors, got Tensor and ndarray"),
        ([Z[:, :0], Z[:, :0]], [], r"at least 1 dimension, got shape \(4, 0\)"),
        ([Z, Z], [Z.to("meta")], "on the same device, got cpu and cpu and meta"),
    ],
)
def test_views_that_cannot_be_are_refused(
    global_views: Any, local_views: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        multi_view_loss(global_views, local_views)


def test_an_unknown_variance_reduction_is_refused() -> None:
    reduction: Any = "median"
    with pytest.raises(ValueError, match="mean or sum, got 'median'"):
        multi_view_loss([Z, Z, Z], variance_reduction=reduction)


def test_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="cov_coeff must be a finite number of at least 0, got na"):
        multi_view_loss([Z, Z], cov_coeff=float("nan"))
