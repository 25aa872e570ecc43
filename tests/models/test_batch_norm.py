"""Batch normalisation over several processes must be torch's over all of their rows."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from gloo import GlooPool
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_hf.models import batch_norm as module_under_test
from vicreg_hf.models.batch_norm import SyncBatchNorm, synchronize
from vicreg_hf.runtime.distributed import (
    find_group,
    norm_group_name,
    rank,
    sum_over_processes,
    world_size,
)

FEATURES = 5
NORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.BatchNorm1d, (), {}),
    "1d over sequences, no weights": (nn.BatchNorm1d, (6,), {"affine": False}),
    "2d": (nn.BatchNorm2d, (3, 2), {}),
    "3d, momentum=None": (nn.BatchNorm3d, (2, 3, 2), {"momentum": None}),
    "other momentum and eps": (nn.BatchNorm1d, (), {"momentum": 0.3, "eps": 0.1}),
    "no running statistics": (nn.BatchNorm1d, (), {"track_running_stats": False}),
}
Results = dict[str, Tensor]


def assert_all_close(actual: Results, expected: Results) -> None:
    """Compare float64 results of sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def batch_norm(kind: str) -> nn.Module:
    make, _, settings = NORMS[kind]
    norm = make(FEATURES, **settings).double()
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def norm_inputs(kind: str, rows: int) -> list[Tensor]:
    """Two batches, far from zero mean and unit variance."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, rows, FEATURES, *NORMS[kind][1])
    return list(torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 + 2)


def normalise(norm: nn.Module, batches: list[Tensor]) -> Results:
    """Outputs, input gradients and state after two training steps, then an output in eval mode."""
    results: Results = {}
    for number, x in enumerate(batches):
        x = x.clone().requires_grad_()
        y = norm(x)
        (y * torch.sin(y)).sum().backward()
        assert x.grad is not None
        results |= {f"output {number}": y.detach(), f"input gradient {number}": x.grad}
    with torch.no_grad():
        results["eval"] = norm.eval()(batches[0])
    return results | dict(norm.named_buffers())


def parameter_gradients(norm: nn.Module) -> Results:
    return {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}


def split_sizes(world: int) -> list[int]:
    return [2 + r for r in range(world)]  # processes need not hold equally many rows


def normalise_own_rows(kinds: list[str]) -> dict[str, tuple[Results, Results]]:
    results = {}
    for kind in kinds:
        norm = SyncBatchNorm.convert(batch_norm(kind))
        sizes = split_sizes(world_size())
        own = normalise(norm, [x.split(sizes)[rank()] for x in norm_inputs(kind, sum(sizes))])
        summed = {name: sum_over_processes(g) for name, g in parameter_gradients(norm).items()}
        results[kind] = own, summed
    return results


@pytest.mark.parametrize(("world", "kinds"), [(2, list(NORMS)), (3, ["2d"])])
def test_batch_norm_over_processes_equals_torchs_on_all_rows(
    gloo: GlooPool, world: int, kinds: list[str]
) -> None:
    sizes, found = split_sizes(world), gloo.run(world, normalise_own_rows, kinds)
    for kind in kinds:
        norm = batch_norm(kind)
        batches = norm_inputs(kind, sum(sizes))
        whole = normalise(norm, batches)
        # in eval mode each normalises by itself, which shows without running statistics
        whole["eval"] = torch.cat([norm(x).detach() for x in batches[0].split(sizes)])
        state = {name for name, _ in norm.named_buffers()}
        for number, results in enumerate(found):
            actual, summed = results[kind]
            own = {k: v if k in state else v.split(sizes)[number] for k, v in whole.items()}
            assert_all_close(actual, own)
            assert_all_close(summed, parameter_gradients(norm))


@pytest.mark.parametrize("kind", NORMS)
def test_without_a_process_group_batch_norm_is_torchs(kind: str) -> None:
    batches = norm_inputs(kind, 6)
    expected = normalise(batch_norm(kind), batches)
    assert_all_close(normalise(SyncBatchNorm.convert(batch_norm(kind)), batches), expected)


def evaluate_unequally_often(kind: str) -> list[Tensor]:
    norm, batches = SyncBatchNorm.convert(batch_norm(kind)).eval(), norm_inputs(kind, 6)
    return [norm(x).detach() for x in batches[: 1 + rank()]]


@pytest.mark.parametrize("kind", ["1d", "no running statistics"])
def test_processes_may_evaluate_unequally_often(gloo: GlooPool, kind: str) -> None:
    norm = batch_norm(kind).eval()
    expected = [norm(x).detach() for x in norm_inputs(kind, 6)]
    for number, found in enumerate(gloo.run(2, evaluate_unequally_often, kind)):
        assert len(found) == 1 + number
        for actual, wanted in zip(found, expected, strict=False):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def normalise_in_half_precision(dtype: torch.dtype) -> Tensor:
    x = norm_inputs("1d", 8)[0].to(dtype).chunk(world_size())[rank()]
    return SyncBatchNorm.convert(nn.BatchNorm1d(FEATURES))(x).detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_keeps_half_precision(gloo: GlooPool, dtype: torch.dtype) -> None:
    actual = torch.cat(gloo.run(2, normalise_in_half_precision, dtype))
    expected = nn.BatchNorm1d(FEATURES)(norm_inputs("1d", 8)[0].to(dtype)).detach()
    eps = torch.finfo(dtype).eps  # each rounds a result of float32 once: neighbours at most
    torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=2 * eps)


def test_conversion_keeps_outputs_state_and_parameters_and_leaves_no_other_batch_norm() -> None:
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for name in ("test_resnet", "test_efficientnet", "test_byobnet"):  # with fused activations
        model = timm.create_model(name, num_classes=0).double()
        before, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model)(x)
        held = [id(parameter) for parameter in model.parameters()]  # as by an optimiser
        converted = SyncBatchNorm.convert(model)
        assert list(converted.state_dict()) == list(before)
        torch.testing.assert_close(converted.state_dict(), before, rtol=0, atol=0)
        assert [id(parameter) for parameter in converted.parameters()] == held
        norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, SyncBatchNorm) and norm.training for norm in norms)
        torch.testing.assert_close(converted(x), expected, rtol=1e-9, atol=1e-9)
    assert not SyncBatchNorm.convert(nn.BatchNorm1d(3).eval()).training


def far_from_zero(sizes: list[int]) -> Tensor:
    """Rows with a mean of 1000 times their deviation; those of the first process are alike."""
    x = torch.randn(sum(sizes), FEATURES, generator=torch.Generator().manual_seed(2)) + 1000
    x[: sizes[0]] = x[0]
    return x


def normalise_far_from_zero() -> Tensor:
    sizes = split_sizes(world_size())
    own = far_from_zero(sizes).split(sizes)[rank()][:, :, None, None]
    image = own.contiguous(memory_format=torch.channels_last)
    return SyncBatchNorm.convert(nn.BatchNorm2d(FEATURES))(image).detach().flatten(1)


def test_statistics_do_not_cancel_in_single_precision(gloo: GlooPool) -> None:
    expected = nn.BatchNorm1d(FEATURES).double()(far_from_zero(split_sizes(3)).double()).detach()
    actual = torch.cat(gloo.run(3, normalise_far_from_zero)).double()
    # float32 holds 1000 to 6e-5; a sum of squares would lose all digits of a variance of 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


# --- several GPUs, as far as a CPU shows it


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    return nn.Sequential(*layers).double()


def own_images() -> Tensor:
    generator = torch.Generator().manual_seed(rank())
    return torch.randn(3, 2, 8, 8, generator=generator, dtype=torch.float64) + rank()


def results_of(model: nn.Module, call: Any) -> Results:
    y = call(model, own_images())
    y.sin().sum().backward()
    state = copy.deepcopy(model.state_dict())
    return {
        "y": y.detach(),
        **state,
        **{f"{k}.grad": g for k, g in parameter_gradients(model).items()},
    }


def apply(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def compiled_and_plain() -> tuple[Results, Results, int]:
    """Also the number of graphs; one that ends within the module is an error."""
    plain = synchronize(two_layers())
    fused = copy.deepcopy(plain)
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(apply, backend=counted, fullgraph=True, dynamic=False)
    return results_of(fused, compiled), results_of(plain, apply), counted.frame_count


def test_normalisation_over_processes_is_part_of_one_compiled_graph(gloo: GlooPool) -> None:
    for fused, plain, graphs in gloo.run(2, compiled_and_plain):
        assert graphs == 1
        assert_all_close(fused, plain)


class Operators(TorchDispatchMode):
    """Remembers which operators of torch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators_called() -> set[str]:
    model = synchronize(two_layers())
    with Operators() as called:
        results_of(model, apply)
    return called.names


def test_nothing_waits_for_a_device(gloo: GlooPool) -> None:
    """Operators whose result the host needs: values, and sizes that depend on values."""
    waiting = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "index"}
    for names in gloo.run(2, operators_called):
        assert "addcmul" in names
        assert not names & waiting


def messages_by_group() -> tuple[int, int]:
    model = pickle.loads(pickle.dumps(copy.deepcopy(synchronize(synchronize(two_layers())))))
    groups: Any = (dist.group.WORLD, find_group(norm_group_name()))
    before = [group._get_sequence_number_for_group() for group in groups]
    results_of(model, apply)
    after = [group._get_sequence_number_for_group() for group in groups]
    return after[0] - before[0], after[1] - before[1]


def test_messages_have_a_group_of_their_own_and_models_are_copied_and_pickled(
    gloo: GlooPool,
) -> None:
    """Two messages a layer, which in the default group would queue behind gradients."""
    for _ in range(2):  # a process group that is formed anew has a new group
        assert gloo.run(2, messages_by_group) == [(0, 4)] * 2


def test_operators_of_cuda_take_the_arguments_of_their_stand_ins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They refuse a CPU's tensors, but only after they have taken every argument."""
    own, called = module_under_test._Portable, set()

    class Both:
        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                with pytest.raises(NotImplementedError, match="'CPU' backend"):
                    getattr(torch, name)(*args)
                if name == "batch_norm_gather_stats_with_counts":
                    first, *_, counts = args
                    running = args[3]
                    # CUDA's accesses counts as of this type, and fails if they are of another
                    assert counts.dtype == (first if running is None else running).dtype
                called.add(name)
                return getattr(own, name)(*args)

            return call

    monkeypatch.setattr(module_under_test, "_Portable", Both())
    for kind in NORMS:
        for of_norm, of_x in ((torch.float64,) * 2, (torch.float32, torch.bfloat16)):
            norm = SyncBatchNorm.convert(batch_norm(kind).to(of_norm))
            normalise(norm, [x.to(of_x) for x in norm_inputs(kind, 6)])
    assert called == {name for name in vars(own) if name.startswith("batch_norm_")}
