"""The loss and its gradients in half precision and in float32, against float64."""

from __future__ import annotations

import pytest
import torch
from authors_loss import LARGER_SHAPES, Terms, authors_loss, embeddings, exact_gradients, gradients
from torch import Tensor

from vicreg_hf import vicreg_loss
from vicreg_hf.loss import covariance


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
        # which of two neighbours a rounding takes at the limit itself is open
        clear = ((exact * 65536).abs() / torch.finfo(torch.float16).max - 1).abs() > 1e-3
        torch.testing.assert_close(actual[clear], expected[clear], rtol=1e-3, atol=1.0)


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
    for name in Terms._fields:
        expected = getattr(theirs, name).float()
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-5, atol=0)
    for actual, exact in zip(gradients(ours.loss, *inputs), exact_gradients(inputs), strict=True):
        tolerance = 1e-5 * float(exact.abs().max())
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("shape", [(2**9, 2**13), (2**16, 64), (2**22, 1)])
def test_sums_of_squares_of_many_float32_entries_are_accurate(
    shape: tuple[int, int], mean: float
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    squares = x.double().square()
    for dim in (None, 0):
        actual = covariance.sum_of_squares(x, dim).double()
        torch.testing.assert_close(actual, squares.sum(dim), rtol=1e-6, atol=0)
