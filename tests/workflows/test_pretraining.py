"""Whole runs of one encoder: what they leave, and that more processes or less memory change little.

Several processes and micro-batches are compared with one process in float64, or in the first step:
later ones differ where rounding puts a ReLU on its other side.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from gloo import GlooPool
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from warm import Script, run_pretraining
from workflow import SMALL, launch, metrics, run, write_images

from vicreg_hf import PretrainingArguments, TwoViews, VICRegConfig, VICRegModel, pretrain
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.building.optimizers import create_optimizer

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of an uninterrupted run of six steps, and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    result = launch(
        *SMALL, f"--dataset_name={images}", "--max_steps=6", f"--output_dir={directory}"
    )
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def timeless(directory: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "views_per_second"} for row in metrics(directory)]


@pytest.mark.parametrize("args", ["demo", None, {"dataset_name": "demo"}])
def test_only_settings_are_taken(args: Any) -> None:
    message = re.escape(f"args must be PretrainingArguments, got {args!r}; Pretraining")
    with pytest.raises(ValueError, match=message):
        pretrain(args)


def test_run_leaves_what_the_readme_promises(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    rows = metrics(directory)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0].keys() == {"step", "epoch", "knn", "knn_images", "knn_pixels"}
    assert rows[-1].keys() == {
        "step", "epoch", "loss", "invariance", "variance", "covariance", "grad_norm", "lr",
        "views_per_second", "embedding_std", "effective_rank", "alignment", "uniformity",
        "bad_images", "knn", "knn_images",
    }  # fmt: skip
    last = rows[-1]
    total = 25 * last["invariance"] + 25 * last["variance"] + last["covariance"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)  # float32 sums of three terms
    assert printed.startswith(
        "Pretraining test_resnet (0.373 million parameters, expander 32-32) on 64 images of "
        "images, 32 pixels: 6 steps, 16 images each, on "
    )
    assert f'AutoModel.from_pretrained("{directory / "encoder"}")' in printed
    for name in ("raw pixels", "20-NN top-1 accuracy, untrained: "):
        assert name in printed
    trained = load_file(directory / "checkpoints" / "step-6" / "model.safetensors")
    model = VICRegModel.from_pretrained(directory / "encoder")
    assert model.state_dict().keys() == trained.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_config_yaml_repeats_the_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = finished
    config = directory / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    assert (settings["image_size"], settings["augmentation"]) == (32, "cifar")
    assert settings["eval_split"] == "test"
    assert settings["image_column"] == "picture"
    pretrain(parse_arguments(["--config", str(config), f"--output_dir={tmp_path}"]))
    assert timeless(tmp_path) == timeless(directory)


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


def test_killed_run_goes_on_to_the_same_weights(
    images: Path, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path}", "--save_steps=2",
             "--max_steps=6"]  # fmt: skip
    process = Script(["scripts/pretrain.py", *flags])
    while not (tmp_path / "checkpoints" / "step-2").is_dir():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "encoder").exists()
    pretrain(parse_arguments(flags))
    assert "Resuming from" in capsys.readouterr().out
    assert [row["step"] for row in metrics(tmp_path)] == list(range(7))
    expected = load_file(finished[0] / "encoder" / "model.safetensors")
    for name, value in load_file(tmp_path / "encoder" / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def first_step(directory: Path) -> dict[str, Any]:
    return next(row for row in metrics(directory) if "loss" in row)


TERMS = ("loss", "invariance", "variance", "covariance", "embedding_std", "effective_rank")


@pytest.mark.parametrize(
    ("flags", "sizes", "processes"),
    [
        # without batch normalisation in the backbone a micro-batch of any size is the whole batch
        (["--architecture=test_vit", '--model_args={"patch_size": 8}'], (16, 6), 1),
        # with it, the micro-batches of two processes are those of one
        ([], (8, 8), 2),
    ],
)
def test_micro_batches_and_processes_leave_the_first_step_as_it_is(
    images: Path, tmp_path: Path, flags: list[str], sizes: tuple[int, int], processes: int
) -> None:
    flags = [*SMALL, f"--dataset_name={images}", "--max_steps=1", *flags]
    one, other = tmp_path / "one", tmp_path / "other"
    pretrain(parse_arguments([*flags, f"--micro_batch_size={sizes[0]}", f"--output_dir={one}"]))
    flags = [*flags, f"--micro_batch_size={sizes[1]}", f"--output_dir={other}"]
    result = run_pretraining(*flags, processes=processes)
    assert result.returncode == 0, result.stderr
    expected, found = first_step(one), first_step(other)
    for term in TERMS:
        assert found[term] == pytest.approx(expected[term], rel=1e-4), term
    # one ReLU that rounding sets the other way is less than this, a wrong average much more
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def train_in_double_precision() -> list[float]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    model: Any = VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[48, 48]))
    model = model.double()
    if dist.is_initialized():
        model = DistributedDataParallel(SyncBatchNorm.convert(model))
    optimizer = create_optimizer("adamw", model, lr=2e-3, weight_decay=0.05)
    batches = GlobalBatches(64, 16, seed=0, rank=rank(), world_size=world_size())
    views, cpu, losses = TwoViews(32, "cifar"), torch.device("cpu"), []
    for x, x_prime in training_views(images, batches, views, steps=range(6), device=cpu):
        loss = model(x.double(), x_prime.double()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_two_processes_agree_with_one_in_double_precision(gloo: GlooPool) -> None:
    """In float32 rounding grows from step to step; in float64 it cannot hide a wrong gradient."""
    one = train_in_double_precision()
    first, second = gloo.run(2, train_in_double_precision)
    assert first == pytest.approx(one, rel=1e-10)
    assert second == first


def test_a_vision_transformer_on_large_images_takes_the_views_size(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "large", rows=20, size=(90, 70))
    args = PretrainingArguments(
        dataset_name=str(folder), architecture="test_vit", model_args={"patch_size": 8},
        expander_dims="32-32", image_size=48, batch_size=8, max_steps=2, optimizer="adamw",
        logging_steps=1, num_workers=1, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    encoder = VICRegModel.from_pretrained(pretrain(args)).encoder
    assert encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 64)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["augmentation"] == "authors"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


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
    "a file in the way": ({"output_dir": "FILE/run"}, "output_dir must be a directory that can be"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_setting_is_one_sentence_before_training(
    images: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "file").write_text("")
    settings = {
        "dataset_name": str(images), "architecture": "test_resnet", "batch_size": 16,
        "expander_dims": "32-32", "output_dir": str(tmp_path), "num_workers": 0,
    } | change  # fmt: skip
    settings["output_dir"] = settings["output_dir"].replace("FILE", str(tmp_path / "file"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pretrain(PretrainingArguments(**settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "empty", rows=0)
    args = PretrainingArguments(dataset_name=str(folder), output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"dataset_name|rows"):
        pretrain(args)


def test_command_line_prints_the_sentence_and_no_traceback(images: Path, tmp_path: Path) -> None:
    result = run_pretraining(
        *SMALL, f"--dataset_name={images}", "--batch_size=15", f"--output_dir={tmp_path}",
        processes=2,
    )  # fmt: skip
    assert result.returncode == 1
    assert "error: batch_size must divide evenly over processes" in result.stderr
    assert "the nearest that does is 16" in result.stderr
    assert "Traceback" not in result.stderr
