"""All losses against their definitions: values, gradients, precision and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from authors_loss import (
    LARGER_SHAPES,
    LOSSES,
    SHAPES,
    assert_exact,
    authors_loss,
    embeddings,
    gradients,
    views_of,
)
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf import vicreg_loss
from vicreg_hf.loss import covariance

both_forms = pytest.mark.parametrize(("rows", "dim"), SHAPES)
every_loss = pytest.mark.parametrize("kind", LOSSES)
several_views = pytest.mark.parametrize("kind", ["two views", "global and local views"])


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


@pytest.mark.parametrize("block_elements", [1, 23])
@both_forms
@every_loss
def test_work_in_blocks_gives_the_same(
    rows: int, dim: int, kind: str, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(covariance.BLOCK_ELEMENTS, "cpu", block_elements)
    monkeypatch.setitem(covariance.STRIPE_ROWS, "cpu", 1 + block_elements // 8)
    assert_same(kind, views_of(LOSSES[kind][0], rows, dim))


MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float32)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 5, (torch.bfloat16,) * 5, (torch.float16,) * 5, MIXED]
)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (32, 64)])
@every_loss
def test_lower_precisions_under_autocast_are_computed_in_float32(
    rows: int, dim: int, mean: float, dtypes: tuple[torch.dtype, ...], kind: str
) -> None:
    count, ours, definition = LOSSES[kind]
    pairs = zip(views_of(count, rows, dim, mean=mean), dtypes[:count], strict=True)
    views = [x.detach().to(dtype).requires_grad_() for x, dtype in pairs]
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(*views)
    assert value.dtype == (torch.float64 if torch.float64 in dtypes[:count] else torch.float32)
    # float32 holds a mean of 100 to 8e-6 of a deviation of 1, and its square to twice that
    wider: Any = {"rtol": 2e-5, "atol": 1e-6, "grad_tolerance": 5e-5}
    assert_exact(value, views, definition, **({} if dtypes == MIXED and not mean else wider))


@both_forms
@several_views
def test_a_view_alone_gets_the_gradient_it_gets_beside_the_others(
    rows: int, dim: int, kind: str
) -> None:
    count, ours, _ = LOSSES[kind]
    views = views_of(count, rows, dim)
    for index, expected in enumerate(gradients(ours(*views), *views)):
        alone = [x.detach().requires_grad_(k == index) for k, x in enumerate(views)]
        assert torch.equal(gradients(ours(*alone), alone[index])[0], expected)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "some rows and columns": lambda x: F.pad(x, (1, 2, 3, 1), value=7.0)[3:-1, 1:-2],
    "one row expanded": lambda x: x[:1].expand_as(x),
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


AUTHORS = LOSSES["two views"][2]


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
    assert_exact(vicreg_loss(*inputs).loss, inputs, AUTHORS)


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


@pytest.mark.parametrize("scale", [0.1, 1.03])  # below the hinge, and around it
@pytest.mark.parametrize(("rows", "dim"), [(300, 700), (700, 300)])
def test_float32_agrees_with_float64_beyond_one_stripe_of_the_product(
    rows: int, dim: int, scale: float
) -> None:
    assert min(rows, dim) > covariance.STRIPE_ROWS["cpu"]
    inputs = [x.float().requires_grad_() for x in embeddings(rows, dim, scale=scale)]
    ours, theirs = vicreg_loss(*inputs), authors_loss(*[x.detach().double() for x in inputs])
    for z in inputs:  # float32 errs by 1e-6 at most: no rounding sets a hinge the other way
        assert (1 - (z.detach().double().var(0) + 1e-4).sqrt()).abs().min() > 2e-5
    expected = tuple(term.float() for term in theirs)
    torch.testing.assert_close(tuple(ours), expected, rtol=1e-5, atol=0)
    assert_exact(ours.loss, inputs, AUTHORS)
