"""Batch normalisation over several processes must be torch's over all of their rows."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from gloo import GlooPool
from torch import Tensor, nn

from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import rank, sum_over_processes, world_size

FEATURES = 5

Results = dict[str, Tensor]


def assert_all_close(actual: Results, expected: Results, tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance)


NORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.BatchNorm1d, (), {}),
    "1d over sequences": (nn.BatchNorm1d, (6,), {}),
    "2d": (nn.BatchNorm2d, (3, 2), {}),
    "3d": (nn.BatchNorm3d, (2, 3, 2), {}),
    "affine=False": (nn.BatchNorm1d, (), {"affine": False}),
    "momentum=None": (nn.BatchNorm1d, (), {"momentum": None}),
    "other momentum and eps": (nn.BatchNorm1d, (), {"momentum": 0.3, "eps": 0.1}),
    "no running statistics": (nn.BatchNorm1d, (), {"track_running_stats": False}),
}


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


def normalise_own_rows(kind: str) -> tuple[Results, Results]:
    norm = SyncBatchNorm.convert(batch_norm(kind))
    sizes = split_sizes(world_size())
    batches = [x.split(sizes)[rank()] for x in norm_inputs(kind, sum(sizes))]
    results = normalise(norm, batches)
    summed = {name: sum_over_processes(g) for name, g in parameter_gradients(norm).items()}
    return results, summed


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind != "no running statistics"])
def test_batch_norm_over_processes_equals_torchs_on_all_rows(
    gloo: GlooPool, kind: str, world: int
) -> None:
    sizes, norm = split_sizes(world), batch_norm(kind)
    whole = normalise(norm, norm_inputs(kind, sum(sizes)))
    state = {name for name, _ in norm.named_buffers()}
    for number, (actual, summed) in enumerate(gloo.run(world, normalise_own_rows, kind)):
        expected = {
            name: value if name in state else value.split(sizes)[number]
            for name, value in whole.items()
        }
        assert_all_close(actual, expected)
        assert_all_close(summed, parameter_gradients(norm))


def eval_without_running_statistics() -> Tensor:
    norm = SyncBatchNorm.convert(batch_norm("no running statistics")).eval()
    x = norm_inputs("no running statistics", 4)[0]
    return norm(x.chunk(2)[rank()]).detach()


def test_without_running_statistics_eval_mode_uses_the_batch(gloo: GlooPool) -> None:
    norm = batch_norm("no running statistics").eval()
    expected = norm(norm_inputs("no running statistics", 4)[0]).detach()
    torch.testing.assert_close(torch.cat(gloo.run(2, eval_without_running_statistics)), expected)


@pytest.mark.parametrize("kind", NORMS)
def test_without_a_process_group_batch_norm_is_torchs(kind: str) -> None:
    batches = norm_inputs(kind, 6)
    expected = normalise(batch_norm(kind), batches)
    assert_all_close(normalise(SyncBatchNorm.convert(batch_norm(kind)), batches), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_keeps_half_precision(gloo: GlooPool, dtype: torch.dtype) -> None:
    for actual, expected in gloo.run(2, normalise_in_half_precision, dtype):
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def normalise_in_half_precision(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = norm_inputs("1d", 8)[0].to(dtype)
    ours, torchs = SyncBatchNorm.convert(nn.BatchNorm1d(FEATURES)), nn.BatchNorm1d(FEATURES)
    return ours(x.chunk(2)[rank()]).detach(), torchs(x).detach().chunk(2)[rank()]


# Conversion


def efficientnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=0).double()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_conversion_keeps_names_and_values_of_the_state(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = SyncBatchNorm.convert(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_conversion_leaves_no_other_batch_norm() -> None:
    converted = SyncBatchNorm.convert(efficientnet())
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, SyncBatchNorm) for norm in norms)


def test_conversion_keeps_parameters_that_an_optimiser_already_holds() -> None:
    model = efficientnet()
    before = [id(parameter) for parameter in model.parameters()]
    assert [id(parameter) for parameter in SyncBatchNorm.convert(model).parameters()] == before


@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_training_mode(training: bool) -> None:
    norm = SyncBatchNorm.convert(nn.BatchNorm1d(3).train(training))
    assert norm.training is training


def test_conversion_keeps_the_activation_that_timm_fuses_into_its_norms() -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = efficientnet().eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(SyncBatchNorm.convert(model)(x), expected)


def representations_of_own_images() -> Tensor:
    model = SyncBatchNorm.convert(efficientnet())
    return model(images().chunk(2)[rank()]).detach()


def images() -> Tensor:
    return torch.randn(
        4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def test_a_converted_backbone_trains_as_one_process_on_all_images(gloo: GlooPool) -> None:
    actual = torch.cat(gloo.run(2, representations_of_own_images))
    torch.testing.assert_close(actual, efficientnet()(images()).detach(), rtol=1e-9, atol=1e-9)


# In float32, and what is sent


def far_from_zero(sizes: list[int]) -> Tensor:
    """(sum, FEATURES), whose standard deviation is a thousandth of its mean; of the first process
    all rows are alike.
    """
    x = torch.randn(sum(sizes), FEATURES, generator=torch.Generator().manual_seed(2)) + 1000
    x[: sizes[0]] = x[0]
    return x


def normalise_far_from_zero(channels_last: bool) -> Tensor:
    sizes = split_sizes(world_size())
    x = far_from_zero(sizes).split(sizes)[rank()]
    norm = SyncBatchNorm.convert(
        nn.BatchNorm2d(FEATURES) if channels_last else nn.BatchNorm1d(FEATURES)
    )
    if channels_last:
        x = x[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return SyncBatchNorm.convert(norm)(x).detach().flatten(1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_do_not_cancel_in_single_precision(gloo: GlooPool, channels_last: bool) -> None:
    actual = torch.cat(gloo.run(3, normalise_far_from_zero, channels_last))
    x = far_from_zero(split_sizes(3)).double()
    expected = nn.BatchNorm1d(FEATURES).double()(x).detach()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)


def messages_of_a_step() -> tuple[int, int]:
    """Sent by one layer in the forward and in the backward pass."""
    sent = [0]

    def counting(name: str) -> Any:
        inner = getattr(dist, name)

        def send(*args: Any, **kwargs: Any) -> Any:
            sent[0] += 1
            return inner(*args, **kwargs)

        return send

    names = [
        n for n in ("all_reduce", "all_gather_single", "all_gather_into_tensor") if hasattr(dist, n)
    ]
    before = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            setattr(dist, name, counting(name))
        y = SyncBatchNorm.convert(nn.BatchNorm1d(FEATURES))(
            torch.randn(4, FEATURES).requires_grad_()
        )
        forward = sent[0]
        y.square().sum().backward()
        return forward, sent[0] - forward
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def test_a_layer_sends_one_message_each_way(gloo: GlooPool) -> None:
    assert gloo.run(2, messages_of_a_step) == [(1, 1), (1, 1)]
