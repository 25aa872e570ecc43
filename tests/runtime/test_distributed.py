"""Several processes must give what one process gives on all rows; torch is the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import GlooPool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_hf import covariance_term, multi_view_loss, variance_term, vicreg_loss
from vicreg_hf.benchmarks.loss import authors_loss, our_loss
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import gather_rows, rank, sum_over_processes, world_size

ROWS_PER_PROCESS = 3
FEATURES = 5
WORLDS = [2, 3, 4]
DIMS = [4, 24]  # N is 6, 9 or 12: more rows than dimensions, and fewer

Results = dict[str, Tensor]


def all_rows(world: int, dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two branches of every process's rows, different on each; not centred, all terms active."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, world * ROWS_PER_PROCESS, dim)
    z, z_prime = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.8 + 0.3
    return z, z_prime


def own(x: Tensor) -> Tensor:
    """This process's rows."""
    return x[rank() * ROWS_PER_PROCESS :][:ROWS_PER_PROCESS].clone()


def assert_all_close(actual: Results, expected: Results, tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)


# The loss


def loss_and_gradients(
    z: Tensor, z_prime: Tensor, group: Any = None, *, compiled: bool = False
) -> Results:
    z, z_prime = z.requires_grad_(), z_prime.requires_grad_()
    compute: Any = vicreg_loss
    if compiled:
        torch.compiler.reset()
        compute = torch.compile(vicreg_loss, fullgraph=True, backend="aot_eager")
    terms = compute(z, z_prime, group=group)
    grad, grad_prime = torch.autograd.grad(terms.loss, (z, z_prime))
    values = {name: value.detach() for name, value in terms._asdict().items()}
    return values | {"grad": grad, "grad_prime": grad_prime}


def loss_of_own_rows(dim: int) -> Results:
    z, z_prime = all_rows(world_size(), dim)
    return loss_and_gradients(own(z), own(z_prime))


def loss_within_pairs(dim: int, compiled: bool = False) -> Results:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    z, z_prime = all_rows(world_size(), dim)
    return loss_and_gradients(own(z), own(z_prime), pairs[rank() // 2], compiled=compiled)


def expected_losses(z: Tensor, z_prime: Tensor, world: int) -> list[Results]:
    """One process on all rows, its gradients times the processes that DDP averages over."""
    whole = loss_and_gradients(z.clone(), z_prime.clone())
    parts = {name: (whole.pop(name) * world).chunk(world) for name in ("grad", "grad_prime")}
    return [whole | {name: part[r] for name, part in parts.items()} for r in range(world)]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradients_equal_those_of_one_process_on_all_rows(
    gloo: GlooPool, world: int, dim: int
) -> None:
    expected = expected_losses(*all_rows(world, dim), world)
    for actual, wanted in zip(gloo.run(world, loss_of_own_rows, dim), expected, strict=True):
        assert_all_close(actual, wanted)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world", WORLDS)
def test_all_processes_see_the_same_loss_to_the_last_bit(
    gloo: GlooPool, world: int, dim: int
) -> None:
    assert len({result["loss"].item() for result in gloo.run(world, loss_of_own_rows, dim)}) == 1


@pytest.mark.parametrize("dim", DIMS)
def test_a_process_group_sees_only_its_own_rows(gloo: GlooPool, dim: int) -> None:
    z, z_prime = all_rows(4, dim)
    expected = [
        result
        for half, half_prime in zip(z.chunk(2), z_prime.chunk(2), strict=True)
        for result in expected_losses(half, half_prime, 2)
    ]
    for actual, wanted in zip(gloo.run(4, loss_within_pairs, dim), expected, strict=True):
        assert_all_close(actual, wanted)


@pytest.mark.parametrize("dim", DIMS)
def test_a_compiled_loss_of_a_process_group_equals_the_eager_one(gloo: GlooPool, dim: int) -> None:
    expected = gloo.run(4, loss_within_pairs, dim)
    for actual, wanted in zip(gloo.run(4, loss_within_pairs, dim, True), expected, strict=True):
        assert_all_close(actual, wanted)


def loss_of_one_row_each() -> float:
    z, z_prime = all_rows(world_size(), 4)
    return vicreg_loss(own(z)[:1], own(z_prime)[:1]).loss.item()


def test_one_row_in_each_of_two_processes_is_enough(gloo: GlooPool) -> None:
    z, z_prime = (x[::ROWS_PER_PROCESS] for x in all_rows(2, 4))
    expected = vicreg_loss(z, z_prime).loss.item()
    assert gloo.run(2, loss_of_one_row_each) == pytest.approx([expected, expected], rel=1e-12)


def refusal(shapes: list[tuple[int, int]]) -> str:
    """What the loss of zeros of this process's shape is refused with; a rank must not raise."""
    z = torch.zeros(shapes[rank()], requires_grad=True)
    try:
        vicreg_loss(z, z)
    except ValueError as error:
        return str(error)
    return "not refused"


DIFFERENT_SHAPES = {
    "fewer rows, N > D": [(3, 4), (3, 4), (2, 4)],
    "fewer rows, N < D": [(3, 24), (3, 24), (2, 24)],
    "more rows, on either side of N = D": [(2, 7), (3, 7)],
    "no rows, N > D": [(0, 4), (5, 4)],
    "no rows, N < D": [(3, 24), (0, 24)],
    "other dimensions": [(3, 4), (3, 24)],
    "equally many elements": [(4, 6), (6, 4)],
}


@pytest.mark.parametrize("shapes", DIFFERENT_SHAPES.values(), ids=DIFFERENT_SHAPES.keys())
def test_shapes_that_differ_between_processes_are_refused_alike_in_all(
    gloo: GlooPool, shapes: list[tuple[int, int]]
) -> None:
    messages = gloo.run(len(shapes), refusal, shapes)
    assert len(set(messages)) == 1
    assert "must hold embeddings of the same shape" in messages[0]
    assert ", ".join(map(str, shapes)) in messages[0]


@pytest.mark.parametrize("dim", DIMS)
def test_no_rows_in_any_process_are_refused_in_all(gloo: GlooPool, dim: int) -> None:
    messages = gloo.run(2, refusal, [(0, dim), (0, dim)])
    assert len(set(messages)) == 1
    assert "at least 2 rows over all processes, got 0" in messages[0]


# What the loss communicates


class Recorder(TorchDispatchMode):
    """Notes the names of operators, and the elements that gathers result in."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.gathered: list[int] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        if func.name() == "c10d::_allgather_base_":
            self.gathered.append(args[0].numel())
        return func(*args, **(kwargs or {}))

    def collectives(self) -> list[str]:
        return [name for name in self.names if name.startswith("c10d::")]


def communication(authors: bool, dim: int) -> tuple[list[str], list[int], list[str], int]:
    """Forward's collectives and its gathers' sizes; backward's, and how many operators it has."""
    z, z_prime = (own(x).requires_grad_() for x in all_rows(world_size(), dim))
    with Recorder() as forward:
        loss = (authors_loss if authors else our_loss)(z, z_prime)
    with Recorder() as backward:
        torch.autograd.grad(loss, (z, z_prime))
    seen = backward.collectives()
    return forward.collectives(), forward.gathered, seen, len(backward.names)


SHAPES_GATHERED = 2 * 4  # of two processes: global and local views, rows, dimensions


def test_the_gram_form_gathers_the_embeddings_once(gloo: GlooPool) -> None:
    num_rows, dim = 2 * ROWS_PER_PROCESS, 24
    for collectives, gathered, _, _ in gloo.run(2, communication, False, dim):
        assert gathered == [SHAPES_GATHERED, 2 * num_rows * dim]
        assert collectives == ["c10d::_allgather_base_"] * 2 + ["c10d::allreduce_"]  # of scalars


def test_the_covariance_form_gathers_no_embeddings(gloo: GlooPool) -> None:
    for collectives, gathered, _, _ in gloo.run(2, communication, False, 4):
        assert gathered == [SHAPES_GATHERED]
        assert set(collectives) == {"c10d::_allgather_base_", "c10d::allreduce_"}


@pytest.mark.parametrize("dim", DIMS)
def test_backward_communicates_nothing(gloo: GlooPool, dim: int) -> None:
    for in_forward, _, in_backward, num_operators in gloo.run(2, communication, False, dim):
        assert in_forward
        assert num_operators > 0
        assert not in_backward


def test_the_recorder_would_see_what_backward_communicates(gloo: GlooPool) -> None:
    for _, _, in_backward, _ in gloo.run(2, communication, True, 24):
        assert in_backward == ["c10d::allreduce_"] * 2  # the authors', one for each branch


# One view, and many


def of_many(kind: str, views: list[Tensor], group: Any = None) -> Results:
    """A loss of however many views it takes, and the gradient of each view."""
    views = [x.requires_grad_() for x in views]
    if kind == "variance":
        values = {"loss": variance_term(views[0], group=group)}
    elif kind == "covariance":
        values = {"loss": covariance_term(views[0], group=group)}
    else:
        values = multi_view_loss(views[:2], views[2:], group=group)._asdict()
    grads = torch.autograd.grad(values["loss"], views, allow_unused=True)
    given = {f"grad {number}": grad for number, grad in enumerate(grads) if grad is not None}
    return {name: value.detach() for name, value in values.items()} | given


def many_views(world: int, dim: int) -> list[Tensor]:
    return [x for seed in (0, 1) for x in all_rows(world, dim, seed=seed)]


def of_own_rows(kind: str, dim: int, paired: bool) -> Results:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if paired else [None]
    views = [own(x) for x in many_views(world_size(), dim)]
    return of_many(kind, views, groups[rank() // 2 if paired else 0])


def expected_of_many(kind: str, views: list[Tensor], world: int) -> list[Results]:
    """One process on all rows, its gradients times the processes that DDP averages over."""
    whole = of_many(kind, [x.clone() for x in views])
    grads = {name: (whole.pop(name) * world).chunk(world) for name in list(whole) if "grad" in name}
    return [whole | {name: part[r] for name, part in grads.items()} for r in range(world)]


@pytest.mark.parametrize("kind", ["variance", "covariance", "multi-view"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world", [2, 3])
def test_terms_of_one_and_many_views_equal_those_of_one_process_on_all_rows(
    gloo: GlooPool, world: int, dim: int, kind: str
) -> None:
    expected = expected_of_many(kind, many_views(world, dim), world)
    results = gloo.run(world, of_own_rows, kind, dim, False)
    for actual, wanted in zip(results, expected, strict=True):
        assert_all_close(actual, wanted)
        assert actual["loss"].item() == results[0]["loss"].item()


@pytest.mark.parametrize("kind", ["variance", "covariance", "multi-view"])
@pytest.mark.parametrize("dim", DIMS)
def test_a_process_group_sees_only_its_own_rows_of_one_and_many_views(
    gloo: GlooPool, dim: int, kind: str
) -> None:
    views = many_views(4, dim)
    halves = [[x.chunk(2)[half] for x in views] for half in (0, 1)]
    expected = [result for half in halves for result in expected_of_many(kind, half, 2)]
    results = gloo.run(4, of_own_rows, kind, dim, True)
    for actual, wanted in zip(results, expected, strict=True):
        assert_all_close(actual, wanted)


def put_together(dim: int) -> tuple[Results, Results]:
    """`vicreg_loss` without invariance, and the terms that must add up to it."""
    views = [own(x).requires_grad_() for x in all_rows(world_size(), dim)]
    whole = vicreg_loss(*views, sim_coeff=0, std_coeff=5, cov_coeff=2).loss
    terms = [5 * variance_term(z) / 2 + 2 * covariance_term(z) for z in views]
    results = []
    for loss in (whole, terms[0] + terms[1]):
        grad, grad_prime = torch.autograd.grad(loss, views)
        results.append({"loss": loss.detach(), "grad": grad, "grad_prime": grad_prime})
    return results[0], results[1]


@pytest.mark.parametrize("dim", DIMS)
def test_the_loss_is_put_together_of_the_terms_on_several_processes(
    gloo: GlooPool, dim: int
) -> None:
    for whole, added in gloo.run(2, put_together, dim):
        assert_all_close(added, whole, tolerance=1e-12)


def compiled_of_own_rows(dim: int) -> tuple[Results, Results]:
    torch.compiler.reset()
    views = [own(x).requires_grad_() for x in many_views(world_size(), dim)]
    results = []
    for compute in (torch.compile(regularized, fullgraph=True, backend="aot_eager"), regularized):
        loss = compute(views)
        grads = torch.autograd.grad(loss, views)
        results.append({"loss": loss.detach()} | {str(i): g for i, g in enumerate(grads)})
    return results[0], results[1]


def regularized(views: list[Tensor]) -> Tensor:
    terms = variance_term(views[0]) + covariance_term(views[0])
    return multi_view_loss(views[:3], views[3:]).loss + terms


@pytest.mark.parametrize("dim", DIMS)
def test_compiled_terms_of_one_and_many_views_equal_the_eager_ones(
    gloo: GlooPool, dim: int
) -> None:
    for compiled, eager in gloo.run(2, compiled_of_own_rows, dim):
        assert_all_close(compiled, eager)


def communication_of_many(kind: str, dim: int) -> tuple[list[str], list[int], list[str], int]:
    """As `communication`."""
    views = [own(x).requires_grad_() for x in many_views(world_size(), dim)]
    with Recorder() as forward:
        if kind == "multi-view":
            loss = multi_view_loss(views[:2], views[2:]).loss
        else:
            loss = {"variance": variance_term, "covariance": covariance_term}[kind](views[0])
    with Recorder() as backward:
        loss.backward()
    seen = backward.collectives()
    return forward.collectives(), forward.gathered, seen, len(backward.names)


@pytest.mark.parametrize(
    ("kind", "dim", "gathered"),
    [
        ("variance", 4, [SHAPES_GATHERED]),
        ("variance", 24, [SHAPES_GATHERED]),
        ("covariance", 4, [SHAPES_GATHERED]),
        ("covariance", 24, [SHAPES_GATHERED, 6 * 24]),
        ("multi-view", 4, [SHAPES_GATHERED]),
        ("multi-view", 24, [SHAPES_GATHERED, 4 * 6 * 24]),  # all four views in one
    ],
)
def test_one_and_many_views_are_gathered_once_and_backward_communicates_nothing(
    gloo: GlooPool, kind: str, dim: int, gathered: list[int]
) -> None:
    for forward, sizes, backward, num_operators in gloo.run(2, communication_of_many, kind, dim):
        assert sizes == gathered
        assert forward.count("c10d::_allgather_base_") == len(gathered)
        assert num_operators > 0
        assert not backward


def refusal_of_many(kind: str, counts: list[tuple[int, int, int]]) -> str:
    """What zeros are refused with; counts are this process's global views, local ones and rows."""
    num_global, num_local, rows = counts[rank()]
    z = torch.zeros(rows, 4)
    try:
        if kind == "multi-view":
            multi_view_loss([z] * num_global, [z] * num_local)
        else:
            {"variance": variance_term, "covariance": covariance_term}[kind](z)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("kind", "counts", "shapes"),
    [
        ("variance", [(1, 0, 3), (1, 0, 2)], "(3, 4), (2, 4)"),
        ("covariance", [(1, 0, 3), (1, 0, 2)], "(3, 4), (2, 4)"),
        ("multi-view", [(2, 0, 3), (2, 0, 2)], "got (3, 4), (2, 4)"),
        ("multi-view", [(2, 1, 3), (2, 1, 2)], "got (3, 4), (2, 4)"),
        ("multi-view", [(2, 0, 3), (2, 1, 3)], "(2, 0, 3, 4), (2, 1, 3, 4)"),
        ("multi-view", [(2, 1, 3), (3, 0, 3)], "(2, 1, 3, 4), (3, 0, 3, 4)"),
        ("multi-view", [(2, 1, 3), (2, 2, 3)], "(2, 1, 3, 4), (2, 2, 3, 4)"),
    ],
)
def test_views_that_differ_between_processes_are_refused_alike_in_all(
    gloo: GlooPool, kind: str, counts: list[tuple[int, int, int]], shapes: str
) -> None:
    messages = gloo.run(2, refusal_of_many, kind, counts)
    assert len(set(messages)) == 1
    assert "must hold embeddings of the same shape" in messages[0]
    assert shapes in messages[0]


# A network under DistributedDataParallel


class TwoBranches(nn.Module):
    """A small network and the loss, as `VICRegModel` has them: each view passes by itself."""

    def __init__(self, dim: int, *, detach_prime: bool = False) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, dim)
        )
        self.detach_prime = detach_prime

    def forward(self, x: Tensor, x_prime: Tensor) -> Tensor:
        z, z_prime = self.network(x), self.network(x_prime)
        return vicreg_loss(z, z_prime.detach() if self.detach_prime else z_prime).loss


def two_branches(dim: int, **settings: Any) -> TwoBranches:
    torch.manual_seed(0)
    return TwoBranches(dim, **settings).double()


def gradients_and_buffers(model: nn.Module, inner: nn.Module, x: Tensor, y: Tensor) -> Results:
    loss = model(x, y)
    loss.backward()
    grads = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads, **dict(inner.named_buffers())}


def network_on_own_rows(dim: int, settings: dict[str, Any]) -> Results:
    model = two_branches(dim, **settings)
    SyncBatchNorm.convert(model)
    wrapped = DistributedDataParallel(model)
    x, x_prime = all_rows(world_size(), FEATURES)
    return gradients_and_buffers(wrapped, model, own(x), own(x_prime))


@pytest.mark.parametrize("settings", [{}, {"detach_prime": True}])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world", WORLDS)
def test_network_gradients_under_ddp_equal_those_of_one_process(
    gloo: GlooPool, world: int, dim: int, settings: dict[str, Any]
) -> None:
    model = two_branches(dim, **settings)
    expected = gradients_and_buffers(model, model, *all_rows(world, FEATURES))
    assert len(expected) == 1 + 6 + 3  # the loss, all parameters, the buffers
    for actual in gloo.run(world, network_on_own_rows, dim, settings):
        assert_all_close(actual, expected)


# Gathers


def gathered() -> Tensor:
    return gather_rows(torch.arange(4).view(2, 2).T + 10 * rank())  # not contiguous


def test_rows_are_gathered_in_rank_order(gloo: GlooPool) -> None:
    expected = torch.tensor([[0, 2], [1, 3], [10, 12], [11, 13], [20, 22], [21, 23]])
    assert all(torch.equal(rows, expected) for rows in gloo.run(3, gathered))


def place() -> tuple[int, int, int]:
    return rank(), world_size(), int(sum_over_processes(torch.tensor(2 ** rank())))


def test_processes_know_their_place_and_sum(gloo: GlooPool) -> None:
    assert gloo.run(3, place) == [(0, 3, 7), (1, 3, 7), (2, 3, 7)]


def test_one_process_is_the_whole_world() -> None:
    assert place() == (0, 1, 1)
    x = torch.ones(2, 3)
    assert torch.equal(gather_rows(x), x)
