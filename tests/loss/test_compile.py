"""Under torch.compile the loss is one graph, and to the last bit what it is without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vicreg_hf import VICRegLoss, vicreg_loss
from vicreg_hf.loss import autograd as terms

SHAPES = [(6, 4), (4, 9)]  # N > D, N < D: both forms of the covariance term
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Each test compiles anew: past a limit dynamo gives up on a function compiled too often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, **settings: Any) -> Any:
    """As one graph, or an error; without inductor's code, which takes seconds to build."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **settings})


def embeddings(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, z_prime = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64) * 0.9 + 0.3
    return [x.to(dtype).requires_grad_() for x in (z, z_prime)]


def assert_same_terms_and_gradients(
    compiled: Any, eager: Any, inputs: list[Tensor], weight: float = 1.0
) -> None:
    """To the last bit; the loss is weighted, so that backward gets a gradient other than 1."""
    actual, expected = compiled(*inputs), eager(*inputs)
    assert type(actual) is type(expected)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(actual, name), value, rtol=0, atol=0)
        assert getattr(actual, name).requires_grad == value.requires_grad
    differentiable = [x for x in inputs if x.requires_grad]
    grads, expected_grads = (
        torch.autograd.grad(weight * terms.loss, differentiable) for terms in (actual, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_the_compiled_loss_and_its_gradients_are_the_eager_ones(
    rows: int, dim: int, dtype: torch.dtype, dynamic: bool
) -> None:
    inputs = embeddings(rows, dim, dtype)
    assert_same_terms_and_gradients(compiled(vicreg_loss, dynamic=dynamic), vicreg_loss, inputs)


class Projected(nn.Module):
    """A layer in front and a weight behind the loss: both compiled into one graph with it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(dim, dim)
        self.loss = VICRegLoss()

    def forward(self, x: Tensor, x_prime: Tensor) -> Tensor:
        return 3 * self.loss(self.layer(x).tanh(), self.layer(x_prime).tanh()).loss


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_inductor_compiles_a_layer_with_the_loss(rows: int, dim: int) -> None:
    model, inputs = Projected(dim).double(), embeddings(rows, dim, torch.float64)
    parameters = [*inputs, *model.parameters()]
    eager = model(*inputs)
    value = compiled(model, backend="inductor")(*inputs)
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(
        torch.autograd.grad(value, parameters), torch.autograd.grad(eager, parameters)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_inductor_leaves_the_loss_as_it_is(dtype: torch.dtype) -> None:
    function = compiled(vicreg_loss, backend="inductor")
    assert_same_terms_and_gradients(function, vicreg_loss, embeddings(4, 9, dtype))


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_dynamo_finds_one_graph_without_a_break(rows: int, dim: int) -> None:
    found = torch._dynamo.explain(vicreg_loss)(*embeddings(rows, dim))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    assert not found.break_reasons


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_the_module_compiles_with_its_settings(rows: int, dim: int) -> None:
    module = VICRegLoss(2.0, 3.0, 5.0, gamma=1.5, eps=1e-3, variance_reduction="sum")
    assert_same_terms_and_gradients(compiled(module), module, embeddings(rows, dim))


@pytest.mark.parametrize("weight", [0.5, 65536.0])  # the second, a gradient scaler's, overflows
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_a_weighted_loss_in_float16_has_the_eager_gradients(
    rows: int, dim: int, weight: float
) -> None:
    inputs = embeddings(rows, dim, torch.float16)
    assert_same_terms_and_gradients(compiled(vicreg_loss), vicreg_loss, inputs, weight)


@pytest.mark.parametrize("needed", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_the_compiler_is_told_the_true_shapes_and_dtypes_and_that_no_input_changes(
    rows: int, dim: int, dtype: torch.dtype, needed: list[bool]
) -> None:
    z, z_prime = (x.detach() for x in embeddings(rows, dim, dtype))
    settings, group = [25.0, 25.0, 1.0, 1.0, 1e-4, 0.5], ""
    forward = ([z, z_prime], 2, True, settings, group)
    value, _, _, _, *saved = terms._forward_op(*forward)
    backward = (torch.ones_like(value), [z, z_prime], saved, needed, 2, settings, group)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(terms._forward_op, forward, test_utils=checks)
    torch.library.opcheck(terms._backward_op, backward, test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_transposed_embeddings_give_the_eager_loss_and_gradients(
    rows: int, dim: int, dtype: torch.dtype, backend: str
) -> None:
    transposed = [x.detach().T.requires_grad_() for x in embeddings(dim, rows, dtype)]
    assert not any(x.is_contiguous() for x in transposed)
    assert_same_terms_and_gradients(compiled(vicreg_loss, backend=backend), vicreg_loss, transposed)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float64)]
)
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_branches_of_different_dtypes_give_the_eager_loss_and_gradients(
    rows: int, dim: int, dtypes: tuple[torch.dtype, torch.dtype], backend: str
) -> None:
    branches = zip(embeddings(rows, dim, torch.float64), dtypes, strict=True)
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in branches]
    function = compiled(vicreg_loss, backend=backend)
    assert_same_terms_and_gradients(function, vicreg_loss, inputs)


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_one_branch_alone_gets_the_eager_gradient(rows: int, dim: int, branch: int) -> None:
    inputs = embeddings(rows, dim)
    inputs[1 - branch].requires_grad_(False)
    assert_same_terms_and_gradients(compiled(vicreg_loss), vicreg_loss, inputs)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_without_gradients_the_compiled_loss_is_the_eager_one(
    rows: int, dim: int, mode: Any
) -> None:
    inputs = [x.detach() for x in embeddings(rows, dim)]
    with mode():
        actual, expected = compiled(vicreg_loss)(*inputs), vicreg_loss(*inputs)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (32, 64)])
def test_under_autocast_the_compiled_loss_is_computed_in_float32(
    rows: int, dim: int, inside: bool
) -> None:
    def under_autocast(z: Tensor, z_prime: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return vicreg_loss(z, z_prime)

    inputs = embeddings(rows, dim)
    if inside:
        terms = compiled(under_autocast)(*inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            terms = compiled(vicreg_loss)(*inputs)
    expected = vicreg_loss(*inputs)  # not under autocast
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(tuple(terms), tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, inputs),
        torch.autograd.grad(expected.loss, inputs),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_other_batch_sizes_give_the_eager_loss_and_gradients(dynamic: bool | None) -> None:
    function = compiled(vicreg_loss, dynamic=dynamic)
    for rows in (4, 6, 12, 4, 9, 8):  # on either side of D = 8, and equal to it
        assert_same_terms_and_gradients(function, vicreg_loss, embeddings(rows, 8))


def test_batch_sizes_of_one_form_share_a_graph() -> None:
    counter = CompileCounterWithBackend("eager")  # aot_eager would count backward too
    function = compiled(vicreg_loss, backend=counter, dynamic=True)
    for rows in (16, 20, 24):
        assert_same_terms_and_gradients(function, vicreg_loss, embeddings(rows, 8))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_embeddings_are_left_as_they_were(rows: int, dim: int) -> None:
    inputs = embeddings(rows, dim)
    before = [x.detach().clone() for x in inputs]
    compiled(vicreg_loss)(*inputs).loss.backward()
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_a_retained_graph_gives_the_same_gradients_again(rows: int, dim: int) -> None:
    inputs = embeddings(rows, dim)
    value = compiled(vicreg_loss)(*inputs).loss
    first, second = (torch.autograd.grad(value, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_second_order_gradients_are_refused_and_not_silently_left_out(rows: int, dim: int) -> None:
    z, z_prime = embeddings(rows, dim)
    value = compiled(vicreg_loss)(z, z_prime).loss

    def gradient_of_a_gradient_penalty() -> None:
        (grad,) = torch.autograd.grad(value, z, create_graph=True)
        (value + grad.square().sum()).backward()

    with pytest.raises(RuntimeError):
        gradient_of_a_gradient_penalty()


def test_a_single_row_is_refused_when_compiled() -> None:
    with pytest.raises(ValueError, match="at least 2 rows over all processes, got 1"):
        compiled(vicreg_loss)(*embeddings(1, 4))
