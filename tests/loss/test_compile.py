"""Under torch.compile a loss is one graph, and to the last bit what it is without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vicreg_hf import VICRegLoss, covariance_term, multi_view_loss, variance_term, vicreg_loss
from vicreg_hf.loss import autograd

SHAPES = [(6, 4), (4, 9)]  # N > D, N < D: both forms of the covariance term
MODULE = VICRegLoss(2.0, 3.0, 5.0, gamma=1.5, eps=1e-3, variance_reduction="sum")
LOSSES: dict[str, tuple[int, Callable[..., Any]]] = {
    "two views": (2, vicreg_loss),
    "module": (2, MODULE),
    "five views": (5, lambda *z: multi_view_loss(z[:2], z[2:])),
    "variance": (1, variance_term),
    "covariance": (1, covariance_term),
}  # fmt: skip
"""By name: how many views it takes, and the loss or its terms."""


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Each test compiles anew: past a limit dynamo gives up on a function compiled too often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, **settings: Any) -> Any:
    """One graph, or an error; without inductor's code, which takes seconds to build."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **settings})


def embeddings(
    rows: int, dim: int, dtype: torch.dtype = torch.float32, *, count: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, rows, dim, generator=generator, dtype=torch.float64) * 0.9 + 0.3
    return [x.to(dtype).requires_grad_() for x in z]


def terms_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same_terms_and_gradients(
    compiled: Any,
    eager: Any,
    inputs: list[Tensor],
    weight: float = 3.0,
    *,
    retain_graph: bool = False,
) -> Tensor:
    """Compare bits; the loss is weighted, so that backward gets a gradient other than 1."""
    actual, expected = terms_of(compiled(*inputs)), terms_of(eager(*inputs))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [x.requires_grad for x in actual] == [x.requires_grad for x in expected]
    differentiable = [x for x in inputs if x.requires_grad]
    grads, expected_grads = (
        torch.autograd.grad(weight * terms[0], differentiable, retain_graph=retain_graph)
        for terms in (actual, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)
    return actual[0]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_compiled_loss_and_its_gradients_are_the_eager_ones(kind: str) -> None:
    count, loss = LOSSES[kind]
    shape = (6, 4) if kind == "module" else (4, 9)
    assert_same_terms_and_gradients(compiled(loss), loss, embeddings(*shape, count=count))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("inductor", False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
@pytest.mark.parametrize("kind", LOSSES)
def test_every_dtype_and_backend_gives_the_eager_loss_and_gradients(
    kind: str, rows: int, dim: int, dtype: torch.dtype, backend: str, dynamic: bool
) -> None:
    count, loss = LOSSES[kind]
    function = compiled(loss, dynamic=dynamic, backend=backend)
    assert_same_terms_and_gradients(function, loss, embeddings(rows, dim, dtype, count=count))


def test_a_compiled_loss_may_overflow_be_repeated_and_leaves_its_inputs() -> None:
    inputs = embeddings(6, 4, torch.float16)
    before = [x.detach().clone() for x in inputs]
    value = assert_same_terms_and_gradients(
        compiled(vicreg_loss), vicreg_loss, inputs, 65536.0, retain_graph=True
    )
    first, second = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, before))
    with pytest.raises(RuntimeError):  # second derivatives are not left out silently
        torch.autograd.grad(value, inputs[0], create_graph=True)[0].sum().backward()


def test_inductor_compiles_a_layer_with_the_loss() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(9, 9).double(), embeddings(4, 9, torch.float64)

    def projected(x: Tensor, x_prime: Tensor) -> Tensor:
        return 3 * vicreg_loss(layer(x).tanh(), layer(x_prime).tanh()).loss

    parameters = [*inputs, *layer.parameters()]
    eager, value = projected(*inputs), compiled(projected, backend="inductor")(*inputs)
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(
        torch.autograd.grad(value, parameters), torch.autograd.grad(eager, parameters)
    )


@pytest.mark.parametrize("product", [True, False])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_the_compiler_is_told_the_true_shapes_and_dtypes_and_that_no_input_changes(
    rows: int, dim: int, product: bool
) -> None:
    views = [x.detach() for x in embeddings(rows, dim, torch.float16, count=3)]
    settings = [25.0, 25.0, 1.0, 1.0, 1e-4, 0.5]
    forward = (views, 2, product, settings, "")
    value, _, _, _, *saved = autograd._forward_op(*forward)
    backward = (torch.ones_like(value), views, saved, [True, False, True], 2, settings, "")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(autograd._forward_op, forward, test_utils=checks)
    torch.library.opcheck(autograd._backward_op, backward, test_utils=checks)


def test_transposed_views_of_two_dtypes_of_which_one_needs_a_gradient() -> None:
    z, z_prime = (x.detach().T for x in embeddings(9, 4))
    inputs = [z.requires_grad_(), z_prime.to(torch.bfloat16)]
    assert not any(x.is_contiguous() for x in inputs)
    assert_same_terms_and_gradients(compiled(vicreg_loss), vicreg_loss, inputs)


def test_without_gradients_the_compiled_loss_is_the_eager_one() -> None:
    inputs = embeddings(4, 9)
    with torch.inference_mode():
        actual, expected = compiled(vicreg_loss)(*inputs), vicreg_loss(*inputs)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


def test_under_autocast_the_compiled_loss_is_computed_in_float32() -> None:
    def under_autocast(z: Tensor, z_prime: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return vicreg_loss(z, z_prime)

    inputs = embeddings(64, 32)
    assert_same_terms_and_gradients(compiled(under_autocast), vicreg_loss, inputs)


def test_batch_sizes_of_one_form_share_a_graph_and_others_give_the_eager_loss() -> None:
    counter = CompileCounterWithBackend("eager")  # aot_eager would count backward too
    function = compiled(vicreg_loss, backend=counter, dynamic=True)
    for rows in (16, 20, 24):
        assert_same_terms_and_gradients(function, vicreg_loss, embeddings(rows, 8))
    assert counter.frame_count == 1
    for rows in (4, 8):  # below D, and equal to it
        assert_same_terms_and_gradients(function, vicreg_loss, embeddings(rows, 8))


def test_a_single_row_is_refused_when_compiled() -> None:
    with pytest.raises(ValueError, match="at least 2 rows over all processes, got 1"):
        compiled(vicreg_loss)(*embeddings(1, 4))
