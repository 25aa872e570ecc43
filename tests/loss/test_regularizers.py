"""One batch's terms alone: against plain formulas, `vicreg_loss`, and in a stock `Trainer`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn import functional as F
from workflow import ROOT

from vicreg_hf import covariance_term, variance_term, vicreg_loss
from vicreg_hf.loss import covariance

SHAPES = [(6, 4), (5, 5), (4, 9), (40, 30), (30, 40)]  # both forms of the covariance term


def plain_variance(z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    return F.relu(gamma - torch.sqrt(z.var(dim=0) + eps)).mean()


def plain_covariance(z: Tensor) -> Tensor:
    """The sum over pairs of dimensions, each by its own definition."""
    centred, dim = z - z.mean(dim=0), z.shape[1]
    pairs = [(i, j) for i in range(dim) for j in range(dim) if i != j]
    squares = [((centred[:, i] * centred[:, j]).sum() / (len(z) - 1)) ** 2 for i, j in pairs]
    return torch.stack(squares).sum() / dim if pairs else 0 * z.sum()


TERMS = [(variance_term, plain_variance), (covariance_term, plain_covariance)]


def embeddings(
    rows: int, dim: int, *, dtype: torch.dtype = torch.float64, seed: int = 0, mean: float = 0.3
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * 0.9 + mean
    return z.to(dtype).requires_grad_()


@pytest.mark.parametrize(("term", "plain"), TERMS)
@pytest.mark.parametrize(("rows", "dim"), [*SHAPES, (2, 1), (2, 7)])
def test_term_and_gradient_are_those_of_the_formula(
    rows: int, dim: int, term: Any, plain: Any
) -> None:
    z = embeddings(rows, dim)
    actual, expected = term(z), plain(z)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    (grad,), (right,) = (torch.autograd.grad(3 * value, z) for value in (actual, expected))
    torch.testing.assert_close(grad, right, rtol=1e-11, atol=1e-13)


def test_settings_of_the_variance_term_count() -> None:
    z = embeddings(6, 4)
    settings: Any = {"gamma": 1.7, "eps": 0.3}
    actual, expected = variance_term(z, **settings), plain_variance(z, **settings)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert not torch.allclose(expected, plain_variance(z))
    torch.testing.assert_close(torch.autograd.grad(actual, z), torch.autograd.grad(expected, z))


def test_terms_match_values_worked_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0, 5.0], [2.0, 4.0, 5.0], [4.0, 2.0, 5.0]])
    # variances 4, 4, 0: only the last lacks, 1 - sqrt(1e-4); the one covariance is 2
    torch.testing.assert_close(variance_term(z), torch.tensor(0.99 / 3))
    torch.testing.assert_close(covariance_term(z), torch.tensor(2 * 2**2 / 3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_vicreg_loss_is_put_together_of_the_terms(rows: int, dim: int, reduction: Any) -> None:
    z, z_prime = branches = embeddings(rows, dim), embeddings(rows, dim, seed=1)
    weights: Any = {"sim_coeff": 3.0, "std_coeff": 5.0, "cov_coeff": 2.0}
    whole = vicreg_loss(z, z_prime, **weights, variance_reduction=reduction)
    variance = variance_term(z) + variance_term(z_prime)
    variance = variance / 2 if reduction == "mean" else variance
    squares = covariance_term(z) + covariance_term(z_prime)
    loss = 3 * F.mse_loss(z, z_prime) + 5 * variance + 2 * squares
    torch.testing.assert_close(whole.variance, variance.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.covariance, squares.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.loss, loss, rtol=1e-12, atol=0)
    grads, right = (torch.autograd.grad(value, branches) for value in (whole.loss, loss))
    torch.testing.assert_close(grads, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("term", "_"), TERMS)
@pytest.mark.parametrize(("rows", "dim"), SHAPES[:3])
def test_gradients_match_finite_differences(rows: int, dim: int, term: Any, _: Any) -> None:
    assert torch.autograd.gradcheck(term, [embeddings(rows, dim)])


@pytest.mark.parametrize(("term", "plain"), TERMS)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), [(64, 16), (16, 24)])
def test_lower_precision_under_autocast_is_computed_in_float32(
    rows: int, dim: int, dtype: torch.dtype, mean: float, term: Any, plain: Any
) -> None:
    z = embeddings(rows, dim, dtype=dtype, mean=mean)
    with torch.autocast("cpu", torch.bfloat16):
        value = term(z)
    assert value.dtype == torch.float32
    exact = z.detach().double().requires_grad_()
    expected = plain(exact)
    torch.testing.assert_close(value, expected.float(), rtol=2e-5, atol=1e-6)
    (grad,), (right,) = torch.autograd.grad(value, z), torch.autograd.grad(expected, exact)
    assert grad.dtype == dtype
    rtol = 0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 0
    tolerance = 5e-5 * float(right.abs().max())
    torch.testing.assert_close(grad.double(), right, rtol=rtol, atol=tolerance)


@pytest.mark.parametrize("block_elements", [1, 23])
@pytest.mark.parametrize(("rows", "dim"), SHAPES[:3])
@pytest.mark.parametrize(("term", "plain"), TERMS)
def test_work_in_blocks_gives_the_same(
    rows: int, dim: int, block_elements: int, term: Any, plain: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(covariance.BLOCK_ELEMENTS, "cpu", block_elements)
    monkeypatch.setitem(covariance.STRIPE_ROWS, "cpu", 1 + block_elements // 8)
    z = embeddings(rows, dim)
    actual, expected = (torch.autograd.grad(function(z), z) for function in (term, plain))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("rows", "dim"), [(512, 64), (64, 512)])
def test_the_variance_term_forms_no_product(rows: int, dim: int) -> None:
    z = embeddings(rows, dim)
    names = {}
    for term in (variance_term, covariance_term):
        with torch.profiler.profile() as profile:
            term(z).backward()
        names[term] = {event.name for event in profile.events() or ()}
    products = {"aten::mm", "aten::addmm_"}
    assert products <= names[covariance_term]
    assert not products & names[variance_term]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("term", "_"), TERMS)
@pytest.mark.parametrize(("rows", "dim"), SHAPES[:3])
def test_compiled_as_one_graph_it_is_the_eager_term_to_the_last_bit(
    rows: int, dim: int, term: Any, _: Any, dtype: torch.dtype, dynamic: bool
) -> None:
    torch.compiler.reset()
    z = embeddings(rows, dim, dtype=dtype)
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    actual, expected = compiled(z), term(z)
    assert torch.equal(actual, expected)
    grads = (torch.autograd.grad(3 * value, z)[0] for value in (actual, expected))
    assert torch.equal(*grads)


@pytest.mark.parametrize(("term", "_"), TERMS)
@pytest.mark.parametrize(("rows", "dim"), SHAPES[:3])
def test_a_retained_graph_gives_the_same_again_and_second_derivatives_are_refused(
    rows: int, dim: int, term: Any, _: Any
) -> None:
    z = embeddings(rows, dim)
    value = term(z)
    first, second = (torch.autograd.grad(value, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative; call backward without"):
        torch.autograd.grad(value, z, create_graph=True)


@pytest.mark.parametrize(("term", "_"), TERMS)
def test_without_gradients_the_term_is_the_same(term: Any, _: Any) -> None:
    z = embeddings(6, 9)
    with torch.inference_mode():
        value = term(z)
    assert not value.requires_grad
    assert torch.equal(value, term(z))


@pytest.mark.parametrize(("term", "_"), TERMS)
@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(4), r"z must have shape \(rows, dimensions\), got \(4,\)"),
        (torch.zeros(4, 3, 2), r"z must have shape \(rows, dimensions\), got \(4, 3, 2\)"),
        (torch.zeros(4, 3).long(), "must be floating point, got torch.int64; convert"),
        (torch.zeros(1, 3), "at least 2 rows over all processes, got 1"),
        (torch.zeros(0, 3), "at least 2 rows over all processes, got 0"),
        (torch.zeros(4, 0), r"at least 1 dimension, got shape \(4, 0\)"),
        (np.zeros((4, 3)), r"must be tensors, got ndarray; convert arrays with torch\.as_tensor"),
        (None, "must be tensors, got NoneType"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(term: Any, _: Any, z: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term(z)


@pytest.mark.parametrize("name", ["gamma", "eps"])
def test_constants_that_cannot_be_are_refused(name: str) -> None:
    settings: dict[str, Any] = {name: "1"}
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got '1'"):
        variance_term(embeddings(4, 3), **settings)


def uncorrelated() -> Tensor:
    """Rows of which the Gram form takes off all that there is."""
    x = torch.zeros(128, 200)
    x[:, :127] = torch.from_numpy(hadamard(128)[:, 1:].copy()).float()
    return x


def test_rounding_leaves_the_covariance_term_at_zero_or_above() -> None:
    x = uncorrelated()
    shares = covariance.analyse(x, len(x), len(x), None)[1]
    assert -1e-3 < shares.item() < 0
    assert covariance_term(x).item() == 0
    terms = vicreg_loss(x, x, sim_coeff=0.0, std_coeff=0.0)
    assert (terms.covariance.item(), terms.loss.item()) == (0, 0)


def test_what_is_cut_off_at_zero_has_its_gradient() -> None:
    """That of the form without the cut: of uncorrelated dimensions zero, here but for rounding."""
    x = uncorrelated().requires_grad_()
    found = torch.autograd.grad(covariance_term(x), x)[0]
    exact = x.detach().double().requires_grad_()
    product = (exact - exact.mean(0)).T @ (exact - exact.mean(0)) / 127
    expected = (product.square().sum() - product.diagonal().square().sum()) / 200
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, exact)[0].float(), rtol=0, atol=1e-6
    )
    assert found.count_nonzero() > 0


# The README's example


def readme_example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "covariance_term(" in block]
    return block


def train(block: str) -> dict[str, Any]:
    """Run the example; what it leaves behind."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def features_and_accuracy(names: dict[str, Any]) -> tuple[Tensor, float]:
    model = names["trainer"].model.eval()
    pixels = torch.stack([row["pixel_values"] for row in names["data"]]).to(model.device)
    labels = torch.tensor([int(row["labels"]) for row in names["data"]])
    with torch.no_grad():
        output = model(pixel_values=pixels, output_hidden_states=True)
    correct = output.logits.argmax(1).cpu() == labels
    return output.hidden_states[-1].mean((2, 3)).cpu(), correct.float().mean().item()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # torch's, without GPU
def test_the_readmes_example_trains_and_its_terms_do_what_they_are_for(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block = readme_example()
    plain = re.sub(r"^.*variance_term\(features\).*\n", "", block, flags=re.MULTILINE)
    assert len(plain.splitlines()) == len(block.splitlines()) - 1
    regularized, accuracy = features_and_accuracy(train(block))
    unregularized, plain_accuracy = features_and_accuracy(train(plain))
    assert min(accuracy, plain_accuracy) > 0.85  # of ten classes
    assert plain_covariance(regularized) < 0.6 * plain_covariance(unregularized)
    assert penalty(regularized) < 0.8 * penalty(unregularized)


def penalty(z: Tensor) -> Tensor:
    """What the example adds to the classifier's loss."""
    return plain_variance(z) + 0.5 * plain_covariance(z)
