"""Under torch.compile a loss is one graph, and to the last bit what it is without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from authors_loss import views_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vicreg_hf import VICRegLoss, covariance_term, multi_view_loss, variance_term, vicreg_loss

MODULE = VICRegLoss(2.0, 3.0, 5.0, gamma=1.5, eps=1e-3, variance_reduction="sum")
LOSSES: dict[str, tuple[int, Callable[..., Any]]] = {
    "two views": (2, vicreg_loss),
    "module": (2, MODULE),
    "five views": (5, lambda *z: multi_view_loss(z[:2], z[2:])),
    "variance": (1, variance_term),
    "covariance": (1, covariance_term),
}  # fmt: skip
"""By name: how many views it takes, and the loss or its terms."""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Each test compiles anew: past a limit dynamo gives up on a function compiled too often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, **settings: Any) -> Any:
    """One graph, or an error; without inductor's code, which takes seconds to build."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **settings})


def float32_views(rows: int, dim: int) -> list[Tensor]:
    return views_of(2, rows, dim, dtype=torch.float32)


def terms_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same_terms_and_gradients(
    compiled: Any, eager: Any, inputs: list[Tensor], weight: float = 3.0, *, retain: bool = False
) -> Tensor:
    """Compare bits; the loss is weighted, so that backward gets a gradient other than 1."""
    actual, expected = terms_of(compiled(*inputs)), terms_of(eager(*inputs))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [x.requires_grad for x in actual] == [x.requires_grad for x in expected]
    grads, expected_grads = (
        torch.autograd.grad(weight * terms[0], inputs, retain_graph=retain)
        for terms in (actual, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)
    return actual[0]


@pytest.mark.parametrize(
    ("dtype", "rows", "dim", "settings"),
    [
        (torch.float32, 4, 9, {}),
        slow(torch.float64, 6, 4, {"dynamic": True}),
        slow(torch.float16, 4, 9, {"backend": "inductor", "dynamic": False}),
    ],
)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_compiled_loss_and_its_gradients_are_the_eager_ones(
    kind: str, dtype: torch.dtype, rows: int, dim: int, settings: dict[str, Any]
) -> None:
    count, loss = LOSSES[kind]
    inputs = views_of(count, rows, dim, dtype=dtype)
    assert_same_terms_and_gradients(compiled(loss, **settings), loss, inputs)


def test_a_compiled_loss_may_overflow_be_repeated_and_leaves_its_inputs() -> None:
    inputs = views_of(2, 6, 4, dtype=torch.float16)
    before = [x.detach().clone() for x in inputs]
    function = compiled(vicreg_loss)
    value = assert_same_terms_and_gradients(function, vicreg_loss, inputs, 65536.0, retain=True)
    first, second = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, before))
    with pytest.raises(RuntimeError):  # second derivatives are not left out silently
        torch.autograd.grad(value, inputs[0], create_graph=True)[0].sum().backward()


@pytest.mark.slow
def test_inductor_compiles_a_layer_with_the_loss() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(9, 9).double(), views_of(2, 4, 9)

    def projected(x: Tensor, x_prime: Tensor) -> Tensor:
        return 3 * vicreg_loss(layer(x).tanh(), layer(x_prime).tanh()).loss

    parameters = [*inputs, *layer.parameters()]
    eager, value = projected(*inputs), compiled(projected, backend="inductor")(*inputs)
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(
        torch.autograd.grad(value, parameters), torch.autograd.grad(eager, parameters)
    )


def test_without_gradients_the_compiled_loss_is_the_eager_one() -> None:
    inputs = float32_views(4, 9)
    with torch.inference_mode():
        actual, expected = compiled(vicreg_loss)(*inputs), vicreg_loss(*inputs)
    assert all(map(torch.equal, actual, expected))
    assert not actual.loss.requires_grad


def test_under_autocast_the_compiled_loss_is_computed_in_float32() -> None:
    def under_autocast(z: Tensor, z_prime: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return vicreg_loss(z, z_prime)

    inputs = float32_views(64, 32)
    assert_same_terms_and_gradients(compiled(under_autocast), vicreg_loss, inputs)


def test_batch_sizes_of_one_form_share_a_graph_and_others_give_the_eager_loss() -> None:
    counter = CompileCounterWithBackend("eager")  # aot_eager would count backward too
    function = compiled(vicreg_loss, backend=counter, dynamic=True)
    for rows in (16, 20, 24, 4, 8):  # the last two below D, and equal to it
        assert_same_terms_and_gradients(function, vicreg_loss, float32_views(rows, 8))
        assert counter.frame_count == 1 or rows < 16
