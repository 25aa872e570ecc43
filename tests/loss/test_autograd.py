"""All losses against their definitions: values, gradients, precision and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from authors_loss import LOSSES, SHAPES, gradients, views_of
from torch.nn import functional as F

from vicreg_hf.loss import covariance

both_forms = pytest.mark.parametrize(("rows", "dim"), SHAPES)
every_loss = pytest.mark.parametrize("kind", LOSSES)


def assert_same(kind: str, views: list[Any], inputs: list[Any] | None = None) -> None:
    """Compare a loss of float64 views and its gradients with the definition's."""
    _, ours, definition = LOSSES[kind]
    actual, expected = ours(*views), definition(*views)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    wanted = gradients(3 * expected, *(inputs or views))
    torch.testing.assert_close(gradients(3 * actual, *(inputs or views)), wanted, rtol=1e-10,
                               atol=1e-12)  # fmt: skip


@every_loss
@pytest.mark.parametrize(("rows", "dim"), [*SHAPES, (2, 1), (2, 7), (40, 30), (30, 40)])
def test_loss_and_gradients_are_those_of_the_definition(rows: int, dim: int, kind: str) -> None:
    assert_same(kind, views_of(LOSSES[kind][0], rows, dim))


@both_forms
@every_loss
def test_gradients_match_finite_differences(rows: int, dim: int, kind: str) -> None:
    count, ours, _ = LOSSES[kind]
    assert torch.autograd.gradcheck(ours, views_of(count, rows, dim))


@pytest.mark.parametrize("block_elements", [1, 23])
@both_forms
@every_loss
def test_work_in_blocks_gives_the_same(
    rows: int, dim: int, kind: str, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(covariance.BLOCK_ELEMENTS, "cpu", block_elements)
    monkeypatch.setitem(covariance.STRIPE_ROWS, "cpu", 1 + block_elements // 8)
    assert_same(kind, views_of(LOSSES[kind][0], rows, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (32, 64)])
@every_loss
def test_lower_precision_under_autocast_is_computed_in_float32(
    rows: int, dim: int, mean: float, dtype: torch.dtype, kind: str
) -> None:
    count, ours, definition = LOSSES[kind]
    views = views_of(count, rows, dim, dtype=dtype, mean=mean)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(*views)
    assert value.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in views]
    expected = definition(*exact)
    # float32 holds a mean of 100 to 8e-6 of a deviation of 1, and its square to twice that
    torch.testing.assert_close(value, expected.float(), rtol=2e-5, atol=1e-6)
    # a gradient is rounded once more, to half a unit in the last place of its dtype
    rtol = 0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 0
    for grad, right in zip(gradients(value, *views), gradients(expected, *exact), strict=True):
        assert grad.dtype == dtype
        size = float(right.abs().max())
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=5e-5 * size)


@pytest.mark.parametrize("kind", ["two views", "global and local views"])
def test_views_of_different_dtypes_get_gradients_of_their_own(kind: str) -> None:
    count, ours, definition = LOSSES[kind]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32][:count]
    pairs = zip(views_of(count, 32, 64), dtypes, strict=True)
    views = [x.detach().to(dtype).requires_grad_() for x, dtype in pairs]
    value = ours(*views)
    exact = [x.detach().double().requires_grad_() for x in views]
    torch.testing.assert_close(value.double(), definition(*exact), rtol=1e-5, atol=0)
    wanted = gradients(definition(*exact), *exact)
    for grad, right, dtype in zip(gradients(value, *views), wanted, dtypes, strict=True):
        assert grad.dtype == dtype
        atol, rtol = 1e-5 * float(right.abs().max()), 0.51 * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=atol)


@both_forms
@pytest.mark.parametrize("kind", ["two views", "global and local views"])
def test_a_view_alone_gets_the_gradient_it_gets_beside_the_others(
    rows: int, dim: int, kind: str
) -> None:
    count, ours, _ = LOSSES[kind]
    views = views_of(count, rows, dim)
    for index, expected in enumerate(gradients(ours(*views), *views)):
        alone = [x.detach().requires_grad_(k == index) for k, x in enumerate(views)]
        assert torch.equal(gradients(ours(*alone), alone[index])[0], expected)


@both_forms
@pytest.mark.parametrize("kind", ["two views", "global and local views"])
def test_one_tensor_as_several_views_gets_the_sum_of_their_gradients(
    rows: int, dim: int, kind: str
) -> None:
    (z,) = views_of(1, rows, dim)
    assert_same(kind, [z] * LOSSES[kind][0], [z])


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "some rows and columns": lambda x: F.pad(x, (1, 2, 3, 1), value=7.0)[3:-1, 1:-2],
    "every second row, backwards in memory": lambda x: x.repeat_interleave(2, 0).flip(0)[::2],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@both_forms
def test_views_that_are_not_contiguous_give_the_same(rows: int, dim: int, layout: str) -> None:
    inputs = views_of(2, rows, dim)
    views = [LAYOUTS[layout](x) for x in inputs]
    assert not any(view.is_contiguous() for view in views)
    assert_same("two views", views, inputs)


@both_forms
@every_loss
def test_a_retained_graph_gives_the_same_again_and_no_second_derivative(
    rows: int, dim: int, kind: str
) -> None:
    count, ours, _ = LOSSES[kind]
    views = views_of(count, rows, dim)
    before = [view.detach().clone() for view in views]
    value = ours(*views)
    first = torch.autograd.grad(value, views, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; call backward without"):
        torch.autograd.grad(value, views, create_graph=True, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, views)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, views)
    assert all(map(torch.equal, views, before))


@pytest.mark.parametrize("context", [torch.no_grad(), torch.inference_mode()])
@every_loss
def test_without_gradients_the_loss_is_the_same(kind: str, context: Any) -> None:
    count, ours, _ = LOSSES[kind]
    views = views_of(count, 6, 9)
    with context:
        value = ours(*views)
    assert not value.requires_grad
    assert torch.equal(value, ours(*views))
