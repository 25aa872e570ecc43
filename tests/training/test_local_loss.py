"""Training with a local loss: micro-batches, processes, resuming, and what a run refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import GlooPool
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from warm import run_pretraining
from workflow import (
    assert_same_run,
    flags_of,
    interrupt,
    metrics,
    train,
    without,
    write_images,
)

from vicreg_hf import VICRegConfig, VICRegModel, backward_in_chunks, pretrain
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.building.sharding import shard
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core")

IMAGES = 8
LOCAL = ["--local_weight=0.25", "--local_matches=3", "--local_expander_dims=16-16"]
FLAGS = [*LOCAL, "--image_size=64", "--max_steps=2", "--save_steps=1"]
"""A run whose maps are of 2 x 2 cells."""


def build(weight: float = 0.25) -> VICRegModel:
    """A model without batch normalisation in its backbone, so that chunks change nothing."""
    torch.manual_seed(0)
    config = VICRegConfig(
        architecture="test_convnext", expander_dims=[16, 24], local_weight=weight,
        local_matches=3, local_view_matches=2, local_expander_dims=[12, 10],
    )  # fmt: skip
    return VICRegModel(config).double().train()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, IMAGES, 3, 64, 64, generator=generator, dtype=torch.float64)
    small = torch.randn(IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64)
    places = 60 * torch.rand(IMAGES, 3, 5, generator=generator, dtype=torch.float64) + 10
    places[..., 4] = torch.randint(2, (IMAGES, 3), generator=generator)
    return x, 0.7 * x + 0.7 * noise, places, small


def own(x: Tensor) -> Tensor:
    return x.chunk(world_size())[rank()]


def step(*, chunk_size: int | None, sharded: bool = False) -> dict[str, Tensor]:
    """Terms and gradients of a batch of three views, and running statistics, in any process."""
    model = build()
    run: nn.Module = model
    if world_size() > 1:
        SyncBatchNorm.convert(model)
        if sharded:
            shard(model, torch.device("cpu"))
        else:
            run = DistributedDataParallel(model)
    x, x_prime, places, small = map(own, batch())
    if chunk_size is None:
        output = run(x, x_prime, places, local_views=[small])
        output.loss.backward()
    else:
        output = backward_in_chunks(
            model, x, x_prime, places, local_views=[small], chunk_size=chunk_size, wrapped=run
        )
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters() if p.grad is not None
    }  # fmt: skip
    assert grads.keys() == dict(model.named_parameters()).keys()
    return output.scalars | grads | dict(model.named_buffers())


def step_in_each_way() -> list[dict[str, Tensor]]:
    return [step(chunk_size=None), step(chunk_size=2), step(chunk_size=2, sharded=True)]


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-8, atol=1e-11,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_micro_batches_give_the_terms_and_gradients_of_the_whole_batch(chunk_size: int) -> None:
    assert_alike(step(chunk_size=chunk_size), step(chunk_size=None))


def test_two_processes_give_the_terms_and_gradients_of_one(gloo: GlooPool) -> None:
    expected = step(chunk_size=None)
    for ways in gloo.run(2, step_in_each_way):
        for actual in ways:
            assert_alike(actual, expected)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images too large for memory."""
    return write_images(tmp_path_factory.mktemp("data") / "images", size=(80, 70))


def test_a_run_logs_its_parts_and_resumes_to_the_same_bits_with_other_workers(
    files: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--micro_batch_size=8", "--layer_decay=0.9"]
    rows = train(files, tmp_path / "whole", *flags)
    for row in rows[1:]:
        whole = 25 * (row["invariance"] + row["variance"]) + row["covariance"]
        local = row["local_location"] + row["local_feature"]
        assert row["loss"] == pytest.approx(0.75 * whole + 0.25 * local, rel=1e-5)
    run = interrupt(tmp_path / "whole", tmp_path / "run")
    train(files, run, *flags, "--num_workers=1")
    assert_same_run(run, tmp_path / "whole")
    first, last = (
        load_file(run / "checkpoints" / f"step-{number}" / "model.safetensors") for number in (1, 2)
    )
    name = "local_expander.0.weight"
    assert not torch.equal(first[name], last[name])
    assert sorted(path.name for path in (run / "encoder").glob("*.safetensors")) == [
        "expander.safetensors", "local_expander.safetensors", "model.safetensors",
    ]  # fmt: skip


def test_a_run_without_a_local_loss_draws_no_places(images: Path, tmp_path: Path) -> None:
    run = setup(parse_arguments(flags_of(images, tmp_path, "--max_steps=1")))
    assert run.model.local_expander is None
    assert run.terms == ("loss", "invariance", "variance", "covariance")
    assert len(run.views.empty_crops(1)) == 2


def test_a_run_starts_from_the_local_expander_of_another_where_widths_are_the_same(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    train(files, source, *FLAGS, "--max_steps=1")
    expected = load_file(source / "encoder" / "local_expander.safetensors")
    for start in (source, source / "checkpoints" / "step-1"):
        given = flags_of(files, tmp_path / "run", *FLAGS, f"--init_from={start}")
        run = setup(parse_arguments(given))
        assert run.model.local_expander is not None
        for name, value in run.model.local_expander.state_dict().items():
            assert torch.equal(value, expected[f"local_expander.{name}"]), name
    assert "The local expander" not in capsys.readouterr().out
    setup(parse_arguments([*given, "--local_expander_dims=8-8"]))  # pyright: ignore
    assert "The local expander, 8-8, is new: that of step-1 is 16-16." in capsys.readouterr().out


REFUSED = [
    ("--local_weight=1", "local_weight must be at least 0 and below 1, got 1.0"),
    ("--local_weight=0", "local_weight must be above 0 with local_matches, local_expander_dims"),
    ("--weights=separate", "local_weight must be 0 with a second branch.* prime_modality=image"),
    ("--local_expander_dims=8-", "local_expander_dims must be positive widths"),
    ("--architecture=pit_ti_224 --image_size=224",
     "local_weight must be 0, or the backbone must have a feature map of 256 channels, but pit_ti"),
    ("--architecture=test_vit --model_args={\"patch_drop_rate\":0.5}",
     "patch_drop_rate of model_args must be 0 where local_weight is above 0, .* got 0.5"),
    ("--image_size=32", "must have several cells .* got one for images of 32 x 32"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "sentence"), REFUSED)
def test_what_has_no_local_loss_is_refused_before_training(
    flags: str, sentence: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        train(images, tmp_path / "run", *LOCAL, *flags.split())
    said = f"{error.value} {capsys.readouterr().err}"
    assert re.search(sentence, said), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_own_parts_that_have_no_local_loss_are_refused(images: Path, tmp_path: Path) -> None:
    def own_loss(z: Tensor, z_prime: Tensor) -> Tensor:
        return (z - z_prime).square().mean()

    args: Any = parse_arguments(flags_of(images, tmp_path, *LOCAL))
    plain = parse_arguments(flags_of(images, tmp_path, "--image_size=64"))
    with pytest.raises(ValueError, match="local_weight, local_matches must be left out with loss"):
        pretrain(args, loss=own_loss)
    with pytest.raises(ValueError, match="loss must be left out with a model that has a local"):
        pretrain(plain, loss=own_loss, model=build().float())
    with pytest.raises(ValueError, match="0 with a model that has no local expander, got "):
        pretrain(args, model=build(weight=0.0).float())


def test_a_model_that_is_given_brings_its_local_loss(files: Path, tmp_path: Path) -> None:
    args = parse_arguments([
        word for word in flags_of(files, tmp_path / "run", "--image_size=64", "--max_steps=1")
        if not word.startswith(("--architecture", "--expander_dims"))
    ])  # fmt: skip
    pretrain(args, model=build().float())
    assert metrics(tmp_path / "run")[-1]["local_location"] > 0


@pytest.mark.slow
def test_two_processes_of_a_run_log_the_same_as_one(files: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--max_steps=1", "--num_workers=1"]
    for number in (1, 2):
        given = flags_of(files, tmp_path / str(number), *flags)
        result = run_pretraining(*given, processes=number)
        assert result.returncode == 0, result.stderr
    one, two = (without({"knn"}, tmp_path / str(number)) for number in (1, 2))
    for name in ("loss", "local_location", "local_feature", "grad_norm"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-4), name
