"""A loss of one's own: several views and processes, and what it may return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo import GlooPool
from torch import Tensor

from vicreg_hf import VICRegLoss, gather_with_gradient, vicreg_loss
from vicreg_hf.loss.own import name_of_loss, own_terms
from vicreg_hf.runtime.distributed import rank, world_size


def barlow_twins(z: Tensor, z_prime: Tensor) -> dict[str, Tensor]:
    z, z_prime = gather_with_gradient(z), gather_with_gradient(z_prime)
    z, z_prime = ((x - x.mean(0)) / x.std(0) for x in (z, z_prime))
    correlation = z.T @ z_prime / len(z)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return {"loss": on_diagonal + 0.005 * off_diagonal, "on_diagonal": on_diagonal}


def views(count: int = 2) -> list[Tensor]:
    made = torch.randn(count, 12, 5, generator=torch.Generator().manual_seed(0)).double()
    return list(made.unbind())


def loss_and_gradients() -> list[Tensor]:
    """The loss of one's own rows, and gradients as DistributedDataParallel would average them."""
    n = 12 // world_size()
    own = [z[rank() * n : (rank() + 1) * n].clone().requires_grad_() for z in views()]
    terms = own_terms(barlow_twins, own)
    terms["loss"].backward()
    assert not terms["on_diagonal"].requires_grad
    return [terms["loss"].detach(), *(z.grad / world_size() for z in own if z.grad is not None)]


def test_two_processes_have_loss_and_gradients_of_one(gloo: GlooPool) -> None:
    loss, *grads = loss_and_gradients()
    found = gloo.run(2, loss_and_gradients)
    for number, grad in enumerate(grads, start=1):
        torch.testing.assert_close(torch.cat([each[number] for each in found]), grad)
    torch.testing.assert_close(torch.stack([each[0] for each in found]), loss.expand(2))


def test_more_views_are_compared_in_the_pairs_of_the_invariance_term() -> None:
    a, b, local = views(3)
    pairs = [vicreg_loss(*pair).loss for pair in ((a, b), (a, local), (b, local))]
    found = own_terms(vicreg_loss, [a, b], [local])
    torch.testing.assert_close(found["loss"], torch.stack(pairs).mean())
    assert found.keys() == {"loss", "invariance", "variance", "covariance"}


def test_a_loss_computes_in_float32_under_autocast() -> None:
    def similarity(z: Tensor, z_prime: Tensor) -> Tensor:
        assert z.dtype == z_prime.dtype == (z.T @ z_prime).dtype == torch.float32
        return (z.T @ z_prime).mean()

    with torch.autocast("cpu", torch.bfloat16):
        own_terms(similarity, [z.to(torch.bfloat16) for z in views()])


@pytest.mark.parametrize(
    ("result", "received"),
    [
        (torch.zeros(3), r"shapes \{'loss': \(3,\)\}"), (1.0, "float"), (None, "NoneType"),
        ({"total": torch.zeros(())}, "the names total"),
        ({"loss": torch.zeros(()), "kind": "x"}, "dict of loss, kind"),
        (torch.zeros((), dtype=torch.long), "Tensor of loss"),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_refused(result: Any, received: str) -> None:
    with pytest.raises(ValueError, match=f"^loss must return a scalar tensor, .*got {received}"):
        own_terms(lambda *_: result, views())


def test_a_loss_is_known_by_its_qualified_name() -> None:
    assert name_of_loss(None) is None
    assert name_of_loss(vicreg_loss) == "vicreg_hf.loss.vicreg.vicreg_loss"
    assert name_of_loss(VICRegLoss()) == "vicreg_hf.loss.vicreg.VICRegLoss"
