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
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import (
    OtherProcessFailed,
    any_process,
    failing_together,
    gather_rows,
    rank,
    sum_over_processes,
    world_size,
)

ROWS_PER_PROCESS = 3
FEATURES = 5
DIMS = [4, 24]  # N is 6 or 9: more rows than dimensions, and fewer
KINDS = ["two views", "four views", "variance", "covariance"]
CPU = torch.device("cpu")

Results = dict[str, Tensor]


def all_rows(world: int, dim: int, views: int = 4) -> list[Tensor]:
    """Views of every process's rows, different on each; not centred, all terms active."""
    generator = torch.Generator().manual_seed(0)
    shape = (views, world * ROWS_PER_PROCESS, dim)
    return list(torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.8 + 0.3)


def own_rows(dim: int) -> list[Tensor]:
    """This process's rows of each view."""
    rows = slice(rank() * ROWS_PER_PROCESS, (rank() + 1) * ROWS_PER_PROCESS)
    return [x[rows].clone() for x in all_rows(world_size(), dim)]


def assert_all_close(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11)


# The losses


def compute(kind: str, views: list[Tensor], group: Any = None) -> Results:
    """A loss of as many views as it takes, with its terms."""
    if kind == "two views":
        return vicreg_loss(*views[:2], group=group)._asdict()
    if kind == "four views":
        return multi_view_loss(views[:2], views[2:], group=group)._asdict()
    term = variance_term if kind == "variance" else covariance_term
    return {"loss": term(views[0], group=group)}


def loss_and_gradients(
    kind: str, views: list[Tensor], group: Any = None, *, compiled: bool = False
) -> Results:
    views = [x.requires_grad_() for x in views]
    function: Any = compute
    if compiled:
        torch.compiler.reset()
        function = torch.compile(compute, fullgraph=True, backend="aot_eager")
    values = function(kind, views, group)
    grads = torch.autograd.grad(values["loss"], views, allow_unused=True)
    named = {f"grad {number}": grad for number, grad in enumerate(grads) if grad is not None}
    return {name: value.detach() for name, value in values.items()} | named


def of_own_rows(kind: str, dim: int, paired: bool = False, compiled: bool = False) -> Results:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if paired else [None, None]
    return loss_and_gradients(kind, own_rows(dim), groups[rank() // 2], compiled=compiled)


def expected_results(kind: str, views: list[Tensor], world: int) -> list[Results]:
    """One process on all rows, its gradients times the processes that DDP averages over."""
    whole = loss_and_gradients(kind, [x.clone() for x in views])
    grads = {name: (whole.pop(name) * world).chunk(world) for name in list(whole) if "grad" in name}
    return [whole | {name: part[r] for name, part in grads.items()} for r in range(world)]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("kind", "world"), [*((kind, 3) for kind in KINDS), ("two views", 2)])
def test_loss_and_gradients_equal_those_of_one_process_on_all_rows(
    gloo: GlooPool, kind: str, world: int, dim: int
) -> None:
    expected = expected_results(kind, all_rows(world, dim), world)
    results = gloo.run(world, of_own_rows, kind, dim)
    for actual, wanted in zip(results, expected, strict=True):
        assert_all_close(actual, wanted)
        assert actual["loss"].item() == results[0]["loss"].item()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("kind", "compiled"), [*((k, False) for k in KINDS), (KINDS[0], True)])
def test_a_process_group_sees_only_its_own_rows_also_compiled(
    gloo: GlooPool, kind: str, compiled: bool, dim: int
) -> None:
    halves = [[x.chunk(2)[half] for x in all_rows(4, dim)] for half in (0, 1)]
    expected = [result for half in halves for result in expected_results(kind, half, 2)]
    results = gloo.run(4, of_own_rows, kind, dim, True, compiled)
    for actual, wanted in zip(results, expected, strict=True):
        assert_all_close(actual, wanted)


def refusal(kind: str, counts: list[tuple[int, int, int]]) -> str:
    """What zeros are refused with; counts are this process's global views, local ones and rows."""
    num_global, num_local, rows = counts[rank()]
    z = torch.zeros(rows, 4)
    try:
        if kind == "multi-view":
            multi_view_loss([z] * num_global, [z] * num_local)
        else:
            compute(kind, [z, z])
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("kind", "counts", "message"),
    [
        ("two views", [(2, 0, 3), (2, 0, 2)], "the same shape, got (3, 4), (2, 4)"),
        ("two views", [(2, 0, 0), (2, 0, 5)], "the same shape, got (0, 4), (5, 4)"),
        ("two views", [(2, 0, 0), (2, 0, 0)], "at least 2 rows over all processes, got 0"),
        ("variance", [(1, 0, 3), (1, 0, 2)], "the same shape, got (3, 4), (2, 4)"),
        ("covariance", [(1, 0, 3), (1, 0, 2)], "the same shape, got (3, 4), (2, 4)"),
        ("multi-view", [(2, 1, 3), (2, 1, 2)], "the same shape, got (3, 4), (2, 4)"),
        ("multi-view", [(2, 1, 3), (3, 0, 3)], "(2, 1, 3, 4), (3, 0, 3, 4)"),
    ],
)
def test_shapes_that_differ_between_processes_are_refused_alike_in_all(
    gloo: GlooPool, kind: str, counts: list[tuple[int, int, int]], message: str
) -> None:
    messages = gloo.run(2, refusal, kind, counts)
    assert messages[0] == messages[1]
    assert message in messages[0]


# What the losses communicate


class Recorder(TorchDispatchMode):
    """Notes the names of collectives, and the elements that gathers result in."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.gathered: list[int] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            self.collectives.append(func.name())
        if func.name() == "c10d::_allgather_base_":
            self.gathered.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def communication(kind: str, dim: int) -> tuple[list[str], list[int], list[str]]:
    """Forward's collectives and its gathers' sizes; backward's collectives."""
    views = [x.requires_grad_() for x in own_rows(dim)]
    with Recorder() as forward:
        loss = compute(kind, views)["loss"]
    with Recorder() as backward:
        loss.backward()
    return forward.collectives, forward.gathered, backward.collectives


SHAPES_GATHERED = 2 * 4  # of two processes: global and local views, rows, dimensions


@pytest.mark.parametrize(
    ("kind", "dim", "gathered"),
    [
        ("two views", 4, []),  # the covariance form
        ("two views", 24, [2 * 6 * 24]),  # the Gram form
        ("four views", 4, []),
        ("four views", 24, [4 * 6 * 24]),  # all views in one
        ("variance", 24, []),
        ("covariance", 24, [6 * 24]),
    ],
)
def test_embeddings_are_gathered_once_and_backward_communicates_nothing(
    gloo: GlooPool, kind: str, dim: int, gathered: list[int]
) -> None:
    for forward, sizes, backward in gloo.run(2, communication, kind, dim):
        assert sizes == [SHAPES_GATHERED, *gathered]
        assert set(forward) == {"c10d::_allgather_base_", "c10d::allreduce_"}
        assert not backward


# A network under DistributedDataParallel


class TwoBranches(nn.Module):
    """A small network and the loss, as `VICRegModel` has them: each view passes by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, dim)
        )
        self.double()

    def forward(self, x: Tensor, x_prime: Tensor) -> Tensor:
        return vicreg_loss(self.network(x), self.network(x_prime)).loss


def gradients_and_buffers(model: nn.Module, inner: nn.Module, views: list[Tensor]) -> Results:
    loss = model(*views[:2])
    loss.backward()
    grads = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads, **dict(inner.named_buffers())}


def network_on_own_rows(dim: int) -> Results:
    model = TwoBranches(dim)
    SyncBatchNorm.convert(model)
    return gradients_and_buffers(DistributedDataParallel(model), model, own_rows(FEATURES))


@pytest.mark.parametrize("dim", DIMS)
def test_network_gradients_under_ddp_equal_those_of_one_process(gloo: GlooPool, dim: int) -> None:
    model = TwoBranches(dim)
    expected = gradients_and_buffers(model, model, all_rows(3, FEATURES))
    assert len(expected) == 1 + 6 + 3  # the loss, all parameters, the buffers
    for actual in gloo.run(3, network_on_own_rows, dim):
        assert_all_close(actual, expected)


# What processes agree on


def agreement() -> tuple[Any, ...]:
    gathered = gather_rows(torch.arange(4).view(2, 2).T + 10 * rank())  # not contiguous
    total = int(sum_over_processes(torch.tensor(2 ** rank())))
    flags = any_process([False, rank() == 1, torch.tensor(rank() == 0)], CPU)
    try:
        with failing_together(CPU):
            if rank() == 1:
                raise LookupError
    except (LookupError, OtherProcessFailed) as error:
        return rank(), world_size(), gathered.tolist(), total, flags, type(error)
    return ()


def test_processes_know_their_place_and_share_rows_sums_flags_and_failures(gloo: GlooPool) -> None:
    rows = [[0, 2], [1, 3], [10, 12], [11, 13]]
    assert gloo.run(2, agreement) == [
        (0, 2, rows, 3, [False, True, True], OtherProcessFailed),
        (1, 2, rows, 3, [False, True, True], LookupError),
    ]


def test_one_process_is_the_whole_world() -> None:
    x = torch.ones(2, 3)
    assert (rank(), world_size(), int(sum_over_processes(torch.tensor(7)))) == (0, 1, 7)
    assert torch.equal(gather_rows(x), x)
    assert any_process([True, False], CPU) == [True, False]
