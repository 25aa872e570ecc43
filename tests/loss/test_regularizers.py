"""One batch's terms alone: against plain formulas, `vicreg_loss`, and in a stock `Trainer`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from authors_loss import SHAPES, plain_loss, views_of
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn import functional as F
from workflow import ROOT

from vicreg_hf import covariance_term, variance_term, vicreg_loss
from vicreg_hf.loss import covariance


def plain_variance(z: Tensor) -> Tensor:
    return plain_loss([z], 1).variance


def plain_covariance(z: Tensor) -> Tensor:
    return plain_loss([z], 1).covariance / 2


def test_settings_of_the_variance_term_count() -> None:
    (z,) = views_of(1, 6, 4)
    actual, expected = variance_term(z, gamma=1.7, eps=0.3), plain_loss([z], 1, gamma=1.7, eps=0.3)
    torch.testing.assert_close(actual, expected.variance, rtol=1e-12, atol=0)
    assert not torch.allclose(actual, plain_variance(z))


def test_terms_match_values_worked_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0, 5.0], [2.0, 4.0, 5.0], [4.0, 2.0, 5.0]])
    # variances 4, 4, 0: only the last lacks, 1 - sqrt(1e-4); the one covariance is 2
    torch.testing.assert_close(variance_term(z), torch.tensor(0.99 / 3))
    torch.testing.assert_close(covariance_term(z), torch.tensor(2 * 2**2 / 3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_vicreg_loss_is_put_together_of_the_terms(rows: int, dim: int, reduction: Any) -> None:
    z, z_prime = branches = views_of(2, rows, dim)
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


@pytest.mark.parametrize(("rows", "dim"), [(512, 64), (64, 512)])
def test_the_variance_term_forms_no_product(rows: int, dim: int) -> None:
    (z,) = views_of(1, rows, dim)
    names = {}
    for term in (variance_term, covariance_term):
        with torch.profiler.profile() as profile:
            term(z).backward()
        names[term] = {event.name for event in profile.events() or ()}
    products = {"aten::mm", "aten::addmm_"}
    assert products <= names[covariance_term]
    assert not products & names[variance_term]


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
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "vicreg_hf/loss/README.md")
             if path.exists()]  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(texts), flags=re.DOTALL)
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
