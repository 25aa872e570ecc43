"""Runs of two processes that FSDP2 shards, beside one of DDP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from warm import run_pretraining, run_script
from workflow import assert_same_file, metrics, without

from vicreg_hf import VICRegModel

pytestmark = pytest.mark.usefixtures("one_core")

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FLAGS = [
    "--architecture=test_vit", '--model_args={"depth": 2}', "--expander_dims=32-32",
    "--batch_size=16", "--image_size=32", "--logging_steps=1", "--num_workers=0",
]  # fmt: skip
STEERED = [
    "--optimizer=adamw", "--base_lr=0.001", "--max_steps=4", "--save_steps=2",
    "--micro_batch_size=8", "--max_grad_norm=1", "--layer_decay=0.7", "--ema_decay=0.7",
    "--online_probe=true", "--gradient_checkpointing=true", "--freeze=patch_embed",
]  # fmt: skip


def train(
    data: Path, run: Path, *flags: str, processes: int = 2, variables: dict[str, str] = FSDP2
) -> str:
    """Pretrain; what is printed."""
    words = [*FLAGS, f"--dataset_name={data}", f"--output_dir={run}", *flags]
    result = run_pretraining(*words, processes=processes, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_same_loss(actual: Path, expected: Path, step: int, *, rel: float = 1e-4) -> None:
    """Two runs compute the loss of a step from the same weights, perhaps rounded otherwise."""
    (loss,), (other,) = (
        [row["loss"] for row in metrics(run) if row["step"] == step and "loss" in row]
        for run in (actual, expected)
    )
    assert loss == pytest.approx(other, rel=rel)


def interrupted(run: Path, copy: Path) -> Path:
    """A copy that is before its last steps, and has begun to save them."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "encoder")
    (copy / "checkpoints/step-4").rename(copy / "checkpoints/.step-4.partial")
    return copy


@pytest.mark.slow
def test_a_sharded_run_is_one_of_ddp_goes_on_exactly_and_is_published(
    images: Path, tmp_path: Path
) -> None:
    ddp, run = tmp_path / "ddp", tmp_path / "run"
    train(images, ddp, *STEERED, variables={})
    train(images, run, *STEERED)
    assert_same_loss(run, ddp, 1)
    one_image = 1 / 32  # held out, whose neighbours a rounding may change
    assert metrics(run)[0]["knn"] == pytest.approx(metrics(ddp)[0]["knn"], abs=1.01 * one_image)
    last = Path("checkpoints/step-4")
    manifest = json.loads((run / last / "manifest.json").read_text())
    assert manifest["parts"] == 2
    parts = [load_file(run / last / f"model.{n}-of-2.safetensors") for n in (1, 2)]
    held = [sum(x.numel() for x in part.values()) for part in parts]
    assert max(held) < 1.1 * min(held)

    again = interrupted(run, tmp_path / "again")
    train(images, again, *STEERED)
    assert without(set(), again) == without(set(), run)
    for file in manifest["files"]:
        if file.endswith(".safetensors"):
            assert_same_file(again / last / file, run / last / file)
    alone = interrupted(run, tmp_path / "alone")
    printed = train(images, alone, *STEERED, processes=1, variables={})
    assert "but for rounding: processes were 2, are 1; parts of the model were 2, are 1" in printed
    assert_same_loss(alone, run, 3)

    published = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True).state_dict()
    trained = VICRegModel.from_pretrained(run / last).backbone.state_dict()
    assert published.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(published[name], value), name


WATCHING = """
import sys
import torch
from vicreg_hf import Callback, pretrain
from vicreg_hf.settings.command_line import parse_arguments

class Watching(Callback):
    def on_step(self, run, step):
        assert not run.average.module.training
        run.average.module.train()  # which is undone
        if step.number == 6:
            print(*sorted(path.name for path in run.writer.folder.iterdir()))

class Alignment(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.ones(32), requires_grad=False)

    def forward(self, z, z_prime):
        return (self.scales * (z - z_prime)).square().mean()

pretrain(parse_arguments(sys.argv[1:]), callbacks=[Watching()], loss=Alignment())
"""


@pytest.mark.slow
def test_a_checkpoint_counts_a_tenth_of_save_steps_later_also_with_a_loss_of_ones_own(
    images: Path, tmp_path: Path
) -> None:
    script = tmp_path / "watching.py"
    script.write_text(WATCHING)
    words = [*FLAGS, f"--dataset_name={images}", f"--output_dir={tmp_path / 'run'}",
             "--max_steps=7", "--save_steps=20", "--keep_every=3", "--ema_decay=0.7"]  # fmt: skip
    result = run_script(str(script), *words, processes=2, **FSDP2)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if "step-3" in line.split()]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--optimizer=lion", "optimizer must be lars or torch's adam, adamw or sgd where FSDP"),
        ("--compile_model=true", "compile_model must be false or left out where FSDP shards"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    flag: str, said: str, images: Path, tmp_path: Path
) -> None:
    words = [*FLAGS, f"--dataset_name={images}", f"--output_dir={tmp_path}", flag]
    result = run_pretraining(*words, processes=2, **FSDP2)
    assert result.returncode != 0
    assert f"error: {said}" in result.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_sharded_run_begins_as_ddp_in_lower_precision_and_publishes_its_best_step(
    images: Path, tmp_path: Path
) -> None:
    flags = ["--optimizer=lars", "--base_lr=0.3", "--max_steps=2", "--knn_steps=1",
             "--keep_best=effective_rank"]  # fmt: skip
    runs = []
    for name, variables in {"ddp": {}, "fsdp": FSDP2}.items():
        runs.append(tmp_path / name)
        variables = variables | {"ACCELERATE_MIXED_PRECISION": "bf16"}
        train(images, runs[-1], *flags, variables=variables)
    # bfloat16 rounds to 8 bits, perhaps otherwise where the layout of weights is another
    assert_same_loss(runs[1], runs[0], 1, rel=0.05)
    assert (runs[1] / "encoder/model.safetensors").is_file()
    assert "highest" in (runs[1] / "encoder/README.md").read_text()
