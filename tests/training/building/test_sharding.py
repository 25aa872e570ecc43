"""FSDP2 in two processes and three: what each holds, computes, saves and loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same_bits
from gloo import GlooPool
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from workflow import small_files

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.checkpoints.reading import CheckpointError, find_damage, load_checkpoint
from vicreg_hf.checkpoints.writing import CheckpointWriter
from vicreg_hf.hub.source import read_source
from vicreg_hf.models.batch_norm import synchronize
from vicreg_hf.runtime.distributed import OtherProcessFailed, norms_of, own_part, rank, world_size
from vicreg_hf.training.building.optimizers import create_optimizer
from vicreg_hf.training.building.sharding import filled, shard, without_weights
from vicreg_hf.training.gradcache import backward_in_chunks

CPU = torch.device("cpu")
ROWS = 12
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("test_vit", {"img_size": 32, "depth": 2}),
    "frozen": ("test_vit", {"img_size": 32, "depth": 2}),
    "own loss": ("test_vit", {"img_size": 32, "depth": 2}),
    "nested blocks": ("test_efficientnet", {}),
}
State = dict[str, Tensor]


class Alignment(nn.Module):
    """A loss with a parameter that is not trained, and that has no rows to share out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, z: Tensor, z_prime: Tensor) -> Tensor:
        return self.scale * (z - z_prime).square().mean()


def build(kind: str, *, seed: int = 0) -> VICRegModel:
    """A model whose first dimensions neither two nor three divide throughout.

    A third process has no rows of the last layer.
    """
    torch.manual_seed(seed)
    name, args = KINDS[kind]
    # float64, and smooth activations: nothing that one rounding switches
    config = VICRegConfig(architecture=name, model_args=args, expander_dims=[13, 4])
    model = VICRegModel(config).double().train()
    synchronize(model)
    if kind == "own loss":
        model.loss = Alignment().double()
    if kind == "frozen":
        for parameter in model.backbone.get_submodule("patch_embed").parameters():
            parameter.requires_grad_(False)
    return model


def sharded(kind: str, optimizer: str, *, seed: int = 0) -> tuple[VICRegModel, Any]:
    model = build(kind, seed=seed)
    shard(model, CPU)
    return model, create_optimizer(optimizer, model, lr=1e-2, weight_decay=1e-3)


def train(model: VICRegModel, optimizer: Any, steps: range, *, wrapped: Any = None,
          chunk_size: int | None = None) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Train on this process's rows of each step; its losses, and the gradients' norms."""
    losses, norms = [], []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, ROWS, 3, 32, 32, generator=generator, dtype=torch.float64)
        views = x.unflatten(1, (world_size(), -1))[:, rank()]
        if chunk_size is None:
            output = (wrapped or model)(*views)
            output.loss.backward()
        else:
            output = backward_in_chunks(model, *views, chunk_size=chunk_size, wrapped=wrapped)
        losses.append(output.scalars["loss"])
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(norms_of([own_part(grad) for grad in grads], sharded=wrapped is None))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def whole(tensors: State) -> State:
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in tensors.items()}


def everything(model: VICRegModel, optimizer: Any) -> State:
    """Whole weights, buffers and optimiser state under flat names; all processes get them."""
    entries = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return whole({**model.state_dict(), **entries})


def compare_with_ddp(kind: str, optimizer: str, chunk_size: int | None) -> dict[str, Any]:
    """Train both ways; what they computed, and how much of the parameters this process holds."""
    plain = build(kind)
    ddp = DistributedDataParallel(plain)
    others = create_optimizer(optimizer, plain, lr=1e-2, weight_decay=1e-3)
    expected = train(plain, others, range(2), wrapped=ddp, chunk_size=chunk_size)
    model, own = sharded(kind, optimizer)
    found = train(model, own, range(2), chunk_size=chunk_size)
    state = everything(model, own)
    parts = [p for p in [*model.parameters(), *(v for s in own.state.values() for v in s.values())]
             if p.ndim]  # fmt: skip
    return {
        "found": (*found, state), "expected": (*expected, everything(plain, others)),
        "whole": [type(p) for p in parts if not isinstance(p, DTensor)],
        "share": sum(own_part(p).numel() for p in parts) / sum(p.numel() for p in parts),
        "blocks": [name for name, part in model.named_modules() if isinstance(part, FSDPModule)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "kind", "optimizer", "chunk_size"),
    [
        (3, "blocks", "lars", None), (2, "blocks", "adamw", 2), (2, "frozen", "sgd", None),
        (2, "nested blocks", "lars", None), (2, "own loss", "sgd", None),
    ],
)  # fmt: skip
def test_processes_with_a_part_of_the_weights_each_train_as_with_all(
    processes: int, kind: str, optimizer: str, chunk_size: int | None, gloo: GlooPool
) -> None:
    for result in gloo.run(processes, compare_with_ddp, kind, optimizer, chunk_size):
        # Adam divides gradients that are 0 but for rounding, as of the bias of keys, by its eps
        torch.testing.assert_close(result["found"], result["expected"], rtol=1e-9, atol=1e-9)
        assert not result["whole"]
        assert 0.8 < result["share"] * processes < 1.2
        assert {"", "backbone.blocks.1"} < set(result["blocks"])
        assert not any(name.startswith("expander") for name in result["blocks"])


def fill() -> tuple[State, State, bool]:
    model = build("blocks", seed=rank())  # the main process's weights count
    twin = without_weights(model).eval()
    shard(model, CPU)
    train(model, create_optimizer("adamw", model, lr=1e-2, weight_decay=0), range(1))
    expected = whole(dict(model.state_dict()))
    with filled(twin, model):
        found = {name: value.clone() for name, value in twin.state_dict().items()}
        assert twin(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).pooler_output.isfinite().all()
        for value in twin.state_dict().values():  # as where the best step is published
            value.zero_()
    assert_same_bits(whole(dict(model.state_dict())), expected)
    with filled(twin, model, main_process_only=True):
        assert any(p.is_meta for p in twin.parameters()) == (rank() > 0)
    return found, expected, all(p.is_meta for p in twin.parameters())


def test_a_copy_has_all_weights_for_a_while(gloo: GlooPool) -> None:
    first, second = gloo.run(2, fill)
    assert_same_bits(first[0], second[0])
    for found, expected, empty in (first, second):
        assert_same_bits(found, expected)
        assert empty


def save_and_go_on(folder: Path) -> tuple[State, list[str]]:
    """Save by all processes after a step, and take another; likewise from what was saved."""
    model, optimizer = sharded("blocks", "adamw")
    train(model, optimizer, range(1))
    writer = CheckpointWriter(folder, world_size=world_size(), sharded=True)
    writer.save(1, model, optimizer, {}, average=model.state_dict())
    before = sorted(path.name for path in folder.iterdir())
    writer.wait()
    saved = everything(model, optimizer)
    train(model, optimizer, range(1, 2))
    again = sharded("blocks", "adamw", seed=1)
    load_checkpoint(folder / "step-1", *again)
    assert_same_bits(everything(*again), saved)
    train(*again, range(1, 2))
    assert_same_bits(everything(*again), everything(model, optimizer))
    return saved, before


def load(path: Path) -> State:
    objects = sharded("blocks", "adamw", seed=2)
    load_checkpoint(path, *objects)
    return everything(*objects)


def test_parts_are_saved_and_loaded_exactly_on_any_number_of_processes(
    gloo: GlooPool, tmp_path: Path
) -> None:
    saved, before = gloo.run(2, save_and_go_on, tmp_path)[0]
    assert before == [".step-1.partial"]  # until all parts are known to be there
    path = tmp_path / "step-1"
    assert find_damage(path) is None
    sizes = {file.name: file.stat().st_size for file in path.glob("model.*")}
    assert sizes.keys() == {"model.1-of-2.safetensors", "model.2-of-2.safetensors"}
    assert max(sizes.values()) < 2 * min(sizes.values())
    for state in gloo.run(3, load, path):
        assert_same_bits(state, saved)
    model = build("blocks", seed=3)
    optimizer = create_optimizer("adamw", model, lr=1e-2, weight_decay=1e-3)
    load_checkpoint(path, model, optimizer)
    assert_same_bits(everything(model, optimizer), saved)
    writer = CheckpointWriter(tmp_path / "plain")
    writer.save(1, model, optimizer, {})
    writer.wait()
    for state in gloo.run(2, load, tmp_path / "plain" / "step-1"):
        assert_same_bits(state, saved)
    loaded = VICRegModel.from_pretrained(path, dtype=torch.float64, sim_coeff=7.0)
    assert loaded.config.sim_coeff == 7
    kept = loaded.state_dict()
    assert_same_bits(kept, {name: saved[name] for name in kept})
    own = {name: torch.ones_like(value) for name, value in kept.items()}
    loaded = VICRegModel.from_pretrained(path, dtype=torch.float64, state_dict=own)
    assert_same_bits(loaded.state_dict(), own)
    for name in ("model.2-of-2.safetensors", "average.1-of-2.safetensors"):
        (path / name).rename(tmp_path / name)
        assert find_damage(path) is not None
        if name.startswith("average"):  # which is what a run starts from
            with pytest.raises(ValueError, match=rf"all 2 parts of its weights, and lacks {name};"):
                read_source(str(path))
        shutil.move(tmp_path / name, path / name)


def fill_the_disk(folder: Path) -> str:
    model, optimizer = sharded("blocks", "adamw")
    writer = CheckpointWriter(folder, world_size=world_size(), sharded=True)
    writer.save(0, model, optimizer, {})
    writer.wait()
    said = ""
    with small_files(1000 if rank() else 10**9):
        writer.save(1, model, optimizer, {})
        try:
            writer.wait()
        except (CheckpointError, OtherProcessFailed) as error:
            said = f"{type(error).__name__}: {error}"
    return said


def test_a_part_that_cannot_be_written_fails_all_and_leaves_earlier_checkpoints(
    gloo: GlooPool, tmp_path: Path
) -> None:
    first, second = gloo.run(2, fill_the_disk, tmp_path)
    assert first.startswith("OtherProcessFailed")
    assert second.startswith("CheckpointError: a checkpoint could not be written to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0"]
    assert find_damage(tmp_path / "step-0") is None
