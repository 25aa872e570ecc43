"""Whole runs, started as users start them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from warm import run_pretraining, run_script
from workflow import ROOT, SMALL, environment, launch, metrics, run, write_images

from vicreg_hf import PretrainingArguments, VICRegModel, pretrain
from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.settings.command_line import parse_arguments


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of an uninterrupted run of eight steps, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    result = launch(
        *SMALL, f"--dataset_name={images}", "--max_steps=8", f"--output_dir={directory}"
    )
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


@pytest.mark.parametrize("args", ["demo", None, {"dataset_name": "demo"}])
def test_what_is_no_arguments_is_refused(args: Any) -> None:
    message = re.escape(f"args must be PretrainingArguments, got {args!r}; Pretraining")
    with pytest.raises(ValueError, match=message):
        pretrain(args)


def test_run_leaves_what_the_readme_promises(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    rows = metrics(directory)
    assert [row["step"] for row in rows] == list(range(9))
    assert rows[0].keys() == {"step", "epoch", "knn", "knn_images", "knn_pixels"}
    assert rows[-1].keys() == {
        "step", "epoch", "loss", "invariance", "variance", "covariance", "grad_norm", "lr",
        "views_per_second", "embedding_std", "effective_rank", "alignment", "uniformity",
        "bad_images", "knn", "knn_images",
    }  # fmt: skip
    last = rows[-1]
    total = 25 * last["invariance"] + 25 * last["variance"] + last["covariance"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    assert (directory / "checkpoints" / "step-8").is_dir()
    assert printed.startswith(
        "Pretraining test_resnet (0.373 million parameters, expander 32-32) on 64 images of "
        "images, 32 pixels: 8 steps, 16 images each, on "
    )
    assert f'AutoModel.from_pretrained("{directory / "encoder"}")' in printed
    assert "raw pixels" in printed
    assert "20-NN top-1 accuracy, untrained: " in printed
    assert "trained encoder" in printed


def test_config_yaml_repeats_the_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = finished
    config = directory / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    assert settings["image_size"] == 32
    assert settings["augmentation"] == "cifar"
    result = run_pretraining("--config", str(config), f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    timeless = [{k: v for k, v in row.items() if k != "views_per_second"} for row in
                metrics(tmp_path)]  # fmt: skip
    expected = [{k: v for k, v in row.items() if k != "views_per_second"} for row in
                metrics(directory)]  # fmt: skip
    assert timeless == expected


def test_three_printed_lines_load_the_encoder_without_vicreg_hf(
    finished: tuple[Path, str],
) -> None:
    directory, printed = finished
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")][:3]
    script = "\n".join(
        [
            "import sys; sys.modules['vicreg_hf'] = None",
            *lines,
            "import numpy, timm, torch, transformers",
            "from PIL import Image",
            "image = Image.fromarray(numpy.arange(3072, dtype='uint8').reshape(32, 32, 3))",
            "pixels = processor(image, return_tensors='pt')['pixel_values']",
            "features = model(pixels).pooler_output",
            f"same = timm.create_model('local-dir:{directory}/encoder', pretrained=True).eval()",
            "torch.testing.assert_close(same(pixels), features)",
            "pipe = transformers.pipeline('image-feature-extraction', model=model, "
            "image_processor=processor, pool=True)",
            "torch.testing.assert_close(torch.tensor(pipe(image)), features)",
            "print(type(model).__name__, tuple(pixels.shape), pixels.mean().item())",
        ]
    )
    result = run([sys.executable, "-c", script])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("TimmWrapperModel (1, 3, 32, 32)")


def test_from_pretrained_gives_backbone_and_expander_back(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    trained = load_file(directory / "checkpoints" / "step-8" / "model.safetensors")
    model = VICRegModel.from_pretrained(directory / "encoder")
    assert model.state_dict().keys() == trained.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_killed_run_goes_on_to_the_same_weights(
    images: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    whole, _ = finished
    flags = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}", "--save_steps=3"]
    # Long enough that it is killed on its way; the schedule must be that of eight steps.
    command = [sys.executable, "scripts/pretrain.py", *flags, "--max_steps=8"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "checkpoints" / "step-3").is_dir():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "encoder").exists()
    result = run_pretraining(*flags, "--max_steps=8")
    assert result.returncode == 0, result.stderr
    assert "Resuming from" in result.stdout
    assert [row["step"] for row in metrics(tmp_path)] == list(range(9))
    expected = load_file(whole / "encoder" / "model.safetensors")
    for name, value in load_file(tmp_path / "encoder" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_two_processes_have_the_loss_curve_of_one(
    images: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    whole, _ = finished
    flags = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}", "--max_steps=8"]
    result = launch(*flags, processes=2)
    assert result.returncode == 0, result.stderr
    for one, two in zip(metrics(whole)[1:], metrics(tmp_path)[1:], strict=True):
        for term in ("loss", "invariance", "variance", "covariance", "embedding_std"):
            assert two[term] == pytest.approx(one[term], rel=1e-3), (one["step"], term)


TERMS = ("loss", "invariance", "variance", "covariance", "embedding_std", "effective_rank")


GENTLE = ["--optimizer=sgd", "--base_lr=0.01", "--max_steps=4"]
"""Steps small enough that differences in rounding stay small."""


@pytest.fixture(scope="module")
def vit_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Flags of a run without batch normalisation in its backbone, and where it was done whole."""
    directory = tmp_path_factory.mktemp("runs") / "vit"
    flags = [*SMALL, *GENTLE, f"--dataset_name={images}", "--architecture=test_vit",
             '--model_args={"patch_size": 8}']  # fmt: skip
    pretrain(parse_arguments([*flags, f"--output_dir={directory}"]))
    return flags, directory


@pytest.mark.parametrize(("micro_batch_size", "processes"), [(1, 1), (6, 1), (8, 1), (6, 2)])
def test_without_batch_norm_in_the_backbone_micro_batches_change_memory_alone(
    vit_run: tuple[list[str], Path], tmp_path: Path, micro_batch_size: int, processes: int
) -> None:
    flags, whole = vit_run
    flags = [*flags, f"--micro_batch_size={micro_batch_size}", f"--output_dir={tmp_path}"]
    if processes == 1:
        pretrain(parse_arguments(flags))
    else:
        result = run_pretraining(*flags, processes=processes)
        assert result.returncode == 0, result.stderr
    assert_same_curve(tmp_path, whole)


def test_micro_batches_are_the_same_rows_on_one_process_and_on_two(
    images: Path, tmp_path: Path
) -> None:
    # Batch normalisation sees which rows make up a micro-batch.
    flags = [*SMALL, *GENTLE, f"--dataset_name={images}", "--micro_batch_size=8"]
    pretrain(parse_arguments([*flags, f"--output_dir={tmp_path / '1'}"]))
    result = run_pretraining(*flags, f"--output_dir={tmp_path / '2'}", processes=2)
    assert result.returncode == 0, result.stderr
    assert_same_curve(tmp_path / "2", tmp_path / "1")


def assert_same_curve(actual: Path, expected: Path) -> None:
    for one, other in zip(metrics(expected)[1:], metrics(actual)[1:], strict=True):
        for term in TERMS:
            assert other[term] == pytest.approx(one[term], rel=1e-4), (one["step"], term)


def test_two_processes_agree_with_one_in_double_precision(tmp_path: Path) -> None:
    # In float32 rounding grows from step to step; in float64 it cannot hide a wrong gradient.
    script = tmp_path / "train.py"
    script.write_text(DOUBLE_PRECISION_TRAINING)
    one = run_script(str(script))
    two = run_script(str(script), processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    losses = [[float(line) for line in out.stdout.split()] for out in (one, two)]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


DOUBLE_PRECISION_TRAINING = """
import os, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from vicreg_hf import TwoViews, VICRegConfig, VICRegModel
from vicreg_hf.data.batches import training_views
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.training.building.optimizers import create_optimizer
from vicreg_hf.data.sampler import GlobalBatches

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
model = VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[48, 48])).double()
if world_size() > 1:
    model = DistributedDataParallel(SyncBatchNorm.convert(model), broadcast_buffers=False)
optimizer = create_optimizer("adamw", model, lr=2e-3, weight_decay=0.05)
batches = GlobalBatches(64, 16, seed=0, rank=rank(), world_size=world_size())
views = TwoViews(32, "cifar")
cpu = torch.device("cpu")
for x, x_prime in training_views(images, batches, views, steps=range(8), device=cpu):
    loss = model(x.double(), x_prime.double()).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank() == 0:
        print(loss.item())
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_vision_transformer_takes_the_views_size(images: Path, tmp_path: Path) -> None:
    args = PretrainingArguments(
        dataset_name=str(images), architecture="test_vit", model_args={"patch_size": 8},
        expander_dims="32-32", batch_size=16, max_steps=2, optimizer="adamw",
        output_dir=str(tmp_path), num_workers=0,
    )  # fmt: skip
    encoder = VICRegModel.from_pretrained(pretrain(args)).encoder
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_large_images_go_through_workers(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "large", rows=20, size=(90, 70))
    args = PretrainingArguments(
        dataset_name=str(folder), architecture="test_resnet", expander_dims="32-32",
        image_size=48, batch_size=8, max_steps=3, logging_steps=1, num_workers=2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    pretrain(args)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["augmentation"] == "authors"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3]


BAD_SETTINGS = {
    "architecture": ({"architecture": "resnet5O"}, "got 'resnet5O'; close to it are resnet50"),
    "image column": ({"image_column": "img"}, "got 'img'; columns of images: picture"),
    "label column": ({"label_column": "label"}, "got 'label'; columns: picture, kind"),
    "split": ({"train_split": "training"}, "train_split must be one of train, test, part of one"),
    "too few images": ({"batch_size": 100}, "batch_size=100 and 64 images; use at most 64"),
    "one image in the last micro-batch": (
        {"micro_batch_size": 5},
        "at least 2 images to compare, got micro_batch_size=5 and batch_size=16; use 6.",
    ),
    "one sample": ({"batch_size": 1}, "at least 2 images, got batch_size=1"),
    "optimizer": ({"optimizer": "adamx"}, "got 'adamx'"),
    "no step": ({"num_train_epochs": 0.01}, "at least one step, got 0.01 epochs of 4 steps"),
    "channels": ({"model_args": {"in_chans": 2}}, "has 1, 3 or 4 channels, got 2"),
    "no channels": ({"model_args": {"in_chans": 0}}, "in_chans must be a positive integer, got 0"),
    "model_args": ({"model_args": {"depht": 2}}, "got {'depht': 2}"),
    "data set": ({"dataset_name": "no/such/folder"}, "got 'no/such/folder'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_setting_is_one_sentence_before_training(
    images: Path, tmp_path: Path, change: dict[str, str | int], message: str
) -> None:
    settings = {"dataset_name": str(images), "architecture": "test_resnet", "batch_size": 16,
                "expander_dims": "32-32", "output_dir": str(tmp_path)}  # fmt: skip
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pretrain(PretrainingArguments(**(settings | change)))  # pyright: ignore
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_command_line_prints_the_sentence_and_no_traceback(images: Path, tmp_path: Path) -> None:
    result = run_pretraining(
        *SMALL, f"--dataset_name={images}", "--batch_size=15", f"--output_dir={tmp_path}",
        processes=2,
    )  # fmt: skip
    assert result.returncode != 0
    assert "error: batch_size must divide evenly over processes" in result.stderr
    assert "the nearest that does is 16" in result.stderr


def test_unwritable_output_directory_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_pretraining(
        *SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path / 'file' / 'run'}"
    )
    assert result.returncode == 1
    assert "error: output_dir must be a directory that can be written" in result.stderr


def test_empty_split_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "empty", rows=0)
    args = PretrainingArguments(dataset_name=str(folder), output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"dataset_name|rows"):
        pretrain(args)


def test_resuming_with_other_settings_names_them(images: Path, tmp_path: Path) -> None:
    settings = {"dataset_name": str(images), "architecture": "test_resnet", "batch_size": 16,
                "expander_dims": "32-32", "output_dir": str(tmp_path), "max_steps": 2}  # fmt: skip
    pretrain(PretrainingArguments(**settings))  # pyright: ignore
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        pretrain(PretrainingArguments(**settings, seed=1))  # pyright: ignore


def test_resuming_on_other_data_is_refused(images: Path, tmp_path: Path) -> None:
    settings = {"architecture": "test_resnet", "batch_size": 16, "expander_dims": "32-32",
                "output_dir": str(tmp_path / "run"), "max_steps": 1}  # fmt: skip
    pretrain(PretrainingArguments(dataset_name=str(images), **settings))  # pyright: ignore
    other = write_images(tmp_path / "other", rows=80)
    with pytest.raises(CheckpointError, match="the data were 64 images"):
        pretrain(PretrainingArguments(dataset_name=str(other), **settings))  # pyright: ignore


def test_resume_required_without_a_checkpoint_fails(images: Path, tmp_path: Path) -> None:
    args = PretrainingArguments(
        dataset_name=str(images), architecture="test_resnet", batch_size=16,
        expander_dims="32-32", output_dir=str(tmp_path), resume="required",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        pretrain(args)
