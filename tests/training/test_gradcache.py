"""Chunks against one pass whose batch normalisation is cut in the same chunks."""

from __future__ import annotations

import ctypes
import gc
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from gloo import GlooPool
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.benchmarks.measuring import peak_extra_mib
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.training.gradcache import backward_in_chunks

ROWS = 12
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch norm": ("test_resnet", {}),
    "layer norm": ("test_vit", {}),
    "dropout": ("test_vit", {"drop_rate": 0.3, "attn_drop_rate": 0.2, "drop_path_rate": 0.3}),
    "batch norm and drop path": ("test_efficientnet", {"drop_path_rate": 0.5}),
}  # fmt: skip
Results = dict[str, Tensor]


def build(kind: str) -> VICRegModel:
    torch.manual_seed(0)
    name, args = MODELS[kind]
    size = {"img_size": 32} if name == "test_vit" else {}
    config = VICRegConfig(architecture=name, model_args=args | size, expander_dims=[24, 40])
    return VICRegModel(config).double().train()


def views() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, ROWS, 3, 32, 32, generator=generator, dtype=torch.float64)
    return x, 0.7 * x + 0.7 * noise


def one_pass(model: VICRegModel, x: Tensor, x_prime: Tensor, chunk_size: int) -> Tensor:
    """Loss of all representations, of which the backbone makes a chunk at a time; one graph."""
    y, y_prime = (
        torch.cat([model.backbone(chunk) for chunk in view.split(chunk_size)])
        for view in (x, x_prime)
    )
    loss = model(y, y_prime, encoded=True).loss
    assert loss is not None
    return loss


def state(model: nn.Module, loss: Tensor | None) -> Results:
    assert loss is not None
    grads = {f"gradient of {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads, **dict(model.named_buffers())}


def assert_all_close(actual: Results, expected: Results, tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "chunk_size"), [*((kind, 5) for kind in MODELS), ("batch norm", 2), ("dropout", 12)]
)
def test_chunks_give_loss_gradients_statistics_and_random_numbers_of_one_pass(
    kind: str, chunk_size: int
) -> None:
    x, x_prime = views()
    whole, model = build(kind), build(kind)
    torch.manual_seed(2)
    loss = one_pass(whole, x, x_prime, chunk_size)
    loss.backward()
    after = torch.rand(3)
    torch.manual_seed(2)
    output = backward_in_chunks(model, x, x_prime, chunk_size=chunk_size)
    assert_all_close(state(model, output.loss), state(whole, loss))
    assert torch.equal(torch.rand(3), after)


def test_gradients_are_added_to_those_already_there_unless_parameters_are_frozen() -> None:
    once, twice = build("batch norm"), build("batch norm")
    for model in (once, twice):
        for parameter in [model.expander[0].weight, *list(model.backbone.parameters())[:4]]:
            parameter.requires_grad_(False)
    backward_in_chunks(once, *views(), chunk_size=4)
    for _ in range(2):
        backward_in_chunks(twice, *views(), chunk_size=4)
    for (name, one), two in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert (one.grad is not None) == one.requires_grad, name
        if one.grad is not None:
            torch.testing.assert_close(two.grad, 2 * one.grad)


@pytest.mark.parametrize("chunk_size", [0, 2.5])
def test_a_chunk_of_no_whole_number_of_images_is_refused(chunk_size: Any) -> None:
    message = f"^chunk_size must be a whole number of at least 1, got {chunk_size!r}.$"
    with pytest.raises(ValueError, match=message):
        backward_in_chunks(build("batch norm"), *views(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("dtype", "factor", "inside"),
    [(torch.bfloat16, 1.0, False), (torch.bfloat16, 1.0, True), (torch.float16, 2.0**10, False)],
)
def test_half_precision_and_loss_scaling_give_gradients_of_one_pass(
    dtype: torch.dtype, factor: float, inside: bool
) -> None:
    """Also inside an autocast of the caller."""
    # Rounding at the chunks' seams is that of one pass: exact but for the order of sums.
    autocast = partial(torch.autocast, "cpu", dtype)
    whole, model = (build("batch norm and drop path").float() for _ in range(2))
    x, x_prime = (view.float() for view in views())
    torch.manual_seed(2)
    with autocast():
        loss = one_pass(whole, x, x_prime, 4)
    (loss * factor).backward()
    torch.manual_seed(2)
    model.forward = autocast()(model.forward)  # as accelerate prepares a model
    with autocast() if inside else nullcontext():
        output = backward_in_chunks(
            model, x, x_prime, chunk_size=4, autocast=autocast,
            backward=lambda loss: (loss * factor).backward(),
        )  # fmt: skip
    torch.testing.assert_close(output.loss, loss.detach())
    for (name, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None, name
        cosine = torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
        assert cosine > 0.999, (name, cosine)
        assert q.grad.norm().item() == pytest.approx(p.grad.norm().item(), rel=1e-2), name


@pytest.mark.parametrize("chunk_size", [4, ROWS])
def test_no_float32_copy_of_the_feature_map_is_made(chunk_size: int) -> None:
    """Accelerate casts all that a model returns, and that would be held through the backward."""
    model = build("dropout").float()
    returned: list[Any] = []
    inner = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    model.forward = lambda *args, **kwargs: returned.append(inner(*args, **kwargs)) or returned[-1]
    x, x_prime = (view.float() for view in views())
    if chunk_size == ROWS:
        model(x, x_prime).loss.backward()
    else:
        backward_in_chunks(model, x, x_prime, chunk_size=chunk_size)
    leaves = [leaf for output in returned for leaf in tree_leaves(dict(output))]
    features = model.backbone.forward_features(x)  # pyright: ignore
    widest = max(leaf.numel() // len(leaf) for leaf in leaves if leaf.ndim)
    assert widest == model.num_features < features[0].numel()
    again = model(x, x_prime, return_features=True).last_hidden_state
    assert again.shape == (ROWS, *features.shape[1:])


# Under DistributedDataParallel


def own_chunks(x: Tensor, micro_batch_size: int) -> Tensor:
    """This process's part of every micro-batch, as `GlobalBatches` deals them."""
    return torch.cat([part.chunk(world_size())[rank()] for part in x.split(micro_batch_size)])


def chunks_under_ddp(kind: str, micro_batch_size: int, steps: int) -> tuple[Results, set[int]]:
    """The state after the last step, and after how many forward passes gradients were reduced."""
    model = build(kind)
    SyncBatchNorm.convert(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    everyone, forwards = dist.group.WORLD, []
    reduced_at: set[int] = set()
    assert everyone is not None

    def reduce(_, bucket):  # torch refuses annotations that are strings
        reduced_at.add(len(forwards))
        return allreduce_hook(everyone, bucket)

    wrapped.register_comm_hook(None, reduce)
    model.register_forward_pre_hook(lambda *_: forwards.append(None))
    x, x_prime = (own_chunks(view, micro_batch_size) for view in views())
    result: Results = {}
    for _ in range(steps):
        model.zero_grad()
        forwards.clear()
        reduced_at.clear()
        output = backward_in_chunks(
            model, x, x_prime, chunk_size=micro_batch_size // world_size(), wrapped=wrapped
        )
        result = state(model, output.loss)
    return result, reduced_at


@pytest.mark.parametrize(("kind", "micro_batch_size"), [("batch norm", 4), ("layer norm", 6)])
def test_two_processes_give_the_gradients_of_one_and_reduce_them_with_the_last_chunk(
    gloo: GlooPool, kind: str, micro_batch_size: int
) -> None:
    model, steps = build(kind), 2
    for _ in range(steps):
        model.zero_grad()
        loss = one_pass(model, *views(), micro_batch_size)
        loss.backward()
    expected = state(model, loss)  # pyright: ignore[reportPossiblyUnboundVariable]
    num_chunks = ROWS // micro_batch_size
    for actual, reduced_at in gloo.run(2, chunks_under_ddp, kind, micro_batch_size, steps):
        assert_all_close(actual, expected)
        # after two views of all chunks, twice, and the loss of all
        assert reduced_at == {4 * num_chunks + 1}


# Memory


def test_memory_follows_the_chunk_and_not_the_batch() -> None:
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("peak memory is read from Linux's /proc")
    model = build("batch norm").float()
    x, x_prime = torch.randn(2, 64, 3, 64, 64)
    in_chunks = partial(backward_in_chunks, model, x, x_prime, chunk_size=4)
    extra = []
    in_chunks()
    for work in (lambda: model(x, x_prime).loss.backward(), in_chunks):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier tests have freed is taken first
        extra.append(peak_extra_mib(work, torch.device("cpu")))
    assert extra[1] < extra[0] / 5
