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
Results = dict[str, Tensor]


def assert_all_close(actual: Results, expected: Results) -> None:
    """Compare float64 results of sums in another order."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11)


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
        whole = normalise(norm, norm_inputs(kind, sum(sizes)))
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


def normalise_in_half_precision() -> list[tuple[Tensor, Tensor]]:
    results = []
    for dtype in (torch.float16, torch.bfloat16):
        x = norm_inputs("1d", 8)[0].to(dtype)
        ours, torchs = SyncBatchNorm.convert(nn.BatchNorm1d(FEATURES)), nn.BatchNorm1d(FEATURES)
        own = ours(x.chunk(2)[rank()]).detach()
        results.append((own, torchs(x).detach().chunk(2)[rank()]))
    return results


def test_batch_norm_keeps_half_precision(gloo: GlooPool) -> None:
    for results in gloo.run(2, normalise_in_half_precision):
        for (actual, expected), dtype in zip(results, (torch.float16, torch.bfloat16), strict=True):
            assert actual.dtype == expected.dtype == dtype
            # each rounds a result of float32 once: neighbours at most
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=2 * eps)


# Conversion


def efficientnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=0).double()


def test_conversion_keeps_state_and_parameters_and_leaves_no_other_batch_norm() -> None:
    for name in ("test_resnet", "test_efficientnet", "test_byobnet"):
        model = timm.create_model(name, num_classes=0)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        held = [id(parameter) for parameter in model.parameters()]  # as by an optimiser
        converted = SyncBatchNorm.convert(model)
        assert list(converted.state_dict()) == list(before)
        assert all(torch.equal(converted.state_dict()[k], value) for k, value in before.items())
        assert [id(parameter) for parameter in converted.parameters()] == held
        norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, SyncBatchNorm) and norm.training for norm in norms)
    assert not SyncBatchNorm.convert(nn.BatchNorm1d(3).eval()).training


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)


def representations_of_own_images() -> Tensor:
    return SyncBatchNorm.convert(efficientnet())(images().chunk(2)[rank()]).detach()


def test_a_converted_backbone_trains_as_one_process_on_all_images(gloo: GlooPool) -> None:
    """It also keeps the activations that timm fuses into its norms, here smooth ones."""
    actual = torch.cat(gloo.run(2, representations_of_own_images))
    torch.testing.assert_close(actual, efficientnet()(images()).detach(), rtol=1e-9, atol=1e-9)
    model = efficientnet().eval()
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(SyncBatchNorm.convert(model)(images()), expected)


# In float32, and what is sent


def far_from_zero(sizes: list[int]) -> Tensor:
    """Rows with a mean of 1000 times their deviation; those of the first process are alike."""
    x = torch.randn(sum(sizes), FEATURES, generator=torch.Generator().manual_seed(2)) + 1000
    x[: sizes[0]] = x[0]
    return x


def normalise_far_from_zero() -> list[Tensor]:
    sizes = split_sizes(world_size())
    x = far_from_zero(sizes).split(sizes)[rank()]
    image = x[:, :, None, None].contiguous(memory_format=torch.channels_last)
    norms = nn.BatchNorm1d(FEATURES), nn.BatchNorm2d(FEATURES)
    return [
        SyncBatchNorm.convert(norm)(inputs).detach().flatten(1)
        for norm, inputs in zip(norms, (x, image), strict=True)
    ]


def test_statistics_do_not_cancel_in_single_precision(gloo: GlooPool) -> None:
    x = far_from_zero(split_sizes(3)).double()
    expected = nn.BatchNorm1d(FEATURES).double()(x).detach()
    for results in zip(*gloo.run(3, normalise_far_from_zero), strict=True):
        # float32 holds 1000 to 6e-5; a sum of squares would lose all digits of a variance of 1
        torch.testing.assert_close(torch.cat(results).double(), expected, rtol=0, atol=1e-3)


def messages_of_a_step() -> tuple[int, int]:
    """Count what one layer sends in the forward and in the backward pass."""
    sent = [0]

    def counting(inner: Any) -> Any:
        def send(*args: Any, **kwargs: Any) -> Any:
            sent[0] += 1
            return inner(*args, **kwargs)

        return send

    names = ("all_reduce", "all_gather_single", "all_gather_into_tensor")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in names if hasattr(dist, name)]:
            patch.setattr(dist, name, counting(getattr(dist, name)))
        x = torch.randn(4, FEATURES).requires_grad_()
        y = SyncBatchNorm.convert(nn.BatchNorm1d(FEATURES))(x)
        forward = sent[0]
        y.square().sum().backward()
        return forward, sent[0] - forward


def test_a_layer_sends_one_message_each_way(gloo: GlooPool) -> None:
    assert gloo.run(2, messages_of_a_step) == [(1, 1), (1, 1)]
