"""Several processes must give what one process gives on all rows; torch is the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import GlooPool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_hf import covariance_term, multi_view_loss, variance_term, vicreg_loss
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
DIMS = [4, 24]  # N is 6 or 9: more rows than dimensions, and fewer
LOSSES: dict[str, tuple[int, Any]] = {
    "two views": (2, vicreg_loss),
    "four views": (4, lambda *z, group: multi_view_loss(z[:2], z[2:], group=group)),
    "variance": (1, lambda z, group: (variance_term(z, group=group),)),
    "covariance": (1, lambda z, group: (covariance_term(z, group=group),)),
}
"""By name: how many views it takes, and the loss with its terms."""
CPU = torch.device("cpu")

Results = tuple[list[Tensor], list[Tensor]]


def all_rows(world: int, dim: int) -> list[Tensor]:
    """Four views of every process's rows, different on each; not centred, all terms active."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, world * ROWS_PER_PROCESS, dim)
    return list(torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.8 + 0.3)


def own_rows(dim: int) -> list[Tensor]:
    return [x.chunk(world_size())[rank()] for x in all_rows(world_size(), dim)]


def loss_and_gradients(
    kind: str, views: list[Tensor], group: Any = None, *, compiled: bool = False
) -> Results:
    count, loss = LOSSES[kind]
    views = [x.clone().requires_grad_() for x in views[:count]]
    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    terms = loss(*views, group=group)
    return [term.detach() for term in terms], list(torch.autograd.grad(terms[0], views))


def of_own_rows(kind: str, dim: int, paired: bool, compiled: bool) -> Results:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if paired else [None, None]
    return loss_and_gradients(kind, own_rows(dim), groups[rank() // 2], compiled=compiled)


def expected_results(kind: str, views: list[Tensor], world: int) -> list[Results]:
    """One process on all rows, its gradients times the processes that DDP averages over."""
    terms, grads = loss_and_gradients(kind, views)
    return [(terms, [(grad * world).chunk(world)[r] for grad in grads]) for r in range(world)]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_equal_those_of_one_process_on_all_rows_of_its_group(
    gloo: GlooPool, kind: str, dim: int, paired: bool
) -> None:
    assert_as_one_process(gloo, kind, dim, paired=paired)


def test_processes_agree_with_one_when_compiled(gloo: GlooPool) -> None:
    assert_as_one_process(gloo, "two views", 24, paired=True, compiled=True)


def assert_as_one_process(
    gloo: GlooPool, kind: str, dim: int, *, paired: bool, compiled: bool = False
) -> None:
    """Compare three processes, or two pairs of them, with one process for each group."""
    world, groups = (4, 2) if paired else (3, 1)
    parts = zip(*(x.chunk(groups) for x in all_rows(world, dim)), strict=True)
    expected = [r for part in parts for r in expected_results(kind, list(part), world // groups)]
    results = gloo.run(world, of_own_rows, kind, dim, paired, compiled)
    for number, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)
        first = results[number - number % (world // groups)]
        assert torch.equal(actual[0][0], first[0][0])


def refusal(counts: list[tuple[int, int, int]]) -> str:
    """Zeros' refusal; counts are this process's global views, local ones and rows."""
    num_global, num_local, rows = counts[rank()]
    z = torch.zeros(rows, 4)
    try:
        multi_view_loss([z] * num_global, [z] * num_local)
    except ValueError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([(2, 0, 0), (2, 0, 5)], "the same shape, got (0, 4), (5, 4)"),
        ([(2, 0, 0), (2, 0, 0)], "at least 2 rows over all processes, got 0"),
        ([(2, 1, 3), (3, 0, 3)], "(2, 1, 3, 4), (3, 0, 3, 4)"),
    ],
)
def test_shapes_that_differ_between_processes_are_refused_alike_in_all(
    gloo: GlooPool, counts: list[tuple[int, int, int]], message: str
) -> None:
    messages = gloo.run(2, refusal, counts)
    assert messages[0] == messages[1]
    assert message in messages[0]


class Recorder(TorchDispatchMode):
    """Notes the names of collectives, and how many elements each results in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("c10d::"):
            self.seen.append((func.name(), args[0].numel() if isinstance(args[0], Tensor) else 0))
        return func(*args, **(kwargs or {}))


def communication(kind: str, dim: int) -> tuple[set[str], list[int], list[Any]]:
    """Names of forward's collectives and its gathers' sizes; backward's collectives."""
    count, loss = LOSSES[kind]
    with Recorder() as forward:
        terms = loss(*(x.requires_grad_() for x in own_rows(dim)[:count]), group=None)
    with Recorder() as backward:
        terms[0].backward()
    gathered = [size for name, size in forward.seen if name == "c10d::_allgather_base_"]
    return {name for name, _ in forward.seen}, gathered, backward.seen


@pytest.mark.parametrize(
    ("kind", "dim", "gathered"),
    [
        ("four views", 4, []),  # the covariance form
        ("four views", 24, [4 * 6 * 24]),  # the Gram form: all views in one
        ("variance", 24, []),
        ("covariance", 24, [6 * 24]),
    ],
)
def test_embeddings_are_gathered_once_and_backward_communicates_nothing(
    gloo: GlooPool, kind: str, dim: int, gathered: list[int]
) -> None:
    shapes = 2 * 4  # of two processes: global and local views, rows, dimensions
    expected = {"c10d::_allgather_base_", "c10d::allreduce_"}, [shapes, *gathered], []
    assert gloo.run(2, communication, kind, dim) == [expected] * 2


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
