"""Whole runs of one encoder: what they leave, and that more processes or less memory change little.

Several processes and micro-batches are compared with one process in float64, or in the first step:
later ones differ where rounding puts a ReLU on its other side.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from gloo import GlooPool
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from warm import Script, run_pretraining, run_script, wait_for
from workflow import WHOLE, assert_same_run, flags_of, metrics, train, write_images

from vicreg_hf import PretrainingArguments, TwoViews, VICRegConfig, VICRegModel, pretrain
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.training.building.optimizers import create_optimizer

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def printed(whole_run: Path) -> str:
    return (whole_run.parent / "printed").read_text()


def test_run_leaves_what_the_readme_promises(whole_run: Path, printed: str) -> None:
    rows = metrics(whole_run)
    assert [row["step"] for row in rows] == list(range(9))
    sample = {f"sample_{kind}{name}" for kind in ("", "embedding_")
              for name in ("effective_rank", "alignment", "uniformity")}  # fmt: skip
    assert rows[0].keys() == {"step", "epoch", "knn", "knn_images", "knn_pixels", *sample}
    assert rows[-1].keys() == {
        "step", "epoch", "loss", "invariance", "variance", "covariance", "grad_norm", "lr",
        "views_per_second", "embedding_std", "effective_rank", "alignment", "uniformity",
        "bad_images", "knn", "knn_images", "probe_loss", "probe", *sample,
    }  # fmt: skip
    last = rows[-1]
    total = 25 * last["invariance"] + 25 * last["variance"] + last["covariance"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)  # float32 sums of three terms
    assert printed.startswith(
        "Pretraining test_resnet (0.373 million parameters, expander 32-32) on 64 images of "
        "images, 32 pixels: 8 steps, 16 images each, on "
    )
    assert f'AutoModel.from_pretrained("{whole_run / "encoder"}")' in printed
    for name in ("raw pixels", "20-NN top-1 accuracy, untrained: "):
        assert name in printed
    trained = load_file(whole_run / "checkpoints" / "step-8" / "model.safetensors")
    model = VICRegModel.from_pretrained(whole_run / "encoder")
    assert model.state_dict().keys() == trained.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


USING = """
import numpy, timm, torch, transformers
from PIL import Image
image = Image.fromarray(numpy.arange(3072, dtype="uint8").reshape(32, 32, 3))
pixels = processor(image, return_tensors="pt")["pixel_values"]
features = model(pixels).pooler_output
same = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
torch.testing.assert_close(same(pixels), features)
parts = {"model": model, "image_processor": processor}
pipe = transformers.pipeline("image-feature-extraction", **parts, pool=True)
torch.testing.assert_close(torch.tensor(pipe(image)), features)
print(type(model).__name__, tuple(pixels.shape))
"""


def test_three_printed_lines_load_the_encoder_without_vicreg_hf(
    whole_run: Path, printed: str, tmp_path: Path
) -> None:
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")][:3]
    script = ["import sys; sys.modules['vicreg_hf'] = None", *lines, USING]
    (tmp_path / "script.py").write_text("\n".join(script))
    result = run_script(str(tmp_path / "script.py"), str(whole_run / "encoder"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "TimmWrapperModel (1, 3, 32, 32)\n"


def test_killed_run_goes_on_to_the_same_weights(
    images: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Script(["scripts/pretrain.py", *flags_of(images, tmp_path, *WHOLE)])
    wait_for(process, (tmp_path / "checkpoints" / "step-3").is_dir)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "encoder").exists()
    train(images, tmp_path, *WHOLE)
    assert "Resuming from" in capsys.readouterr().out
    assert_same_run(tmp_path, whole_run)


def test_micro_batches_leave_the_first_step_as_it_is(images: Path, tmp_path: Path) -> None:
    """Without batch normalisation in the backbone, those of any size are the whole batch."""
    flags = ["--max_steps=1", "--architecture=test_vit", '--model_args={"patch_size": 8}']
    expected, found = (
        train(images, tmp_path / str(size), *flags, f"--micro_batch_size={size}")[-1]
        for size in (16, 6)
    )
    terms = ("loss", "invariance", "variance", "covariance", "embedding_std", "effective_rank")
    for term in terms:
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
    train(
        folder, tmp_path / "run", "--architecture=test_vit", '--model_args={"patch_size": 8}',
        "--image_size=48", "--batch_size=8", "--max_steps=2", "--num_workers=1",
    )  # fmt: skip
    encoder = VICRegModel.from_pretrained(tmp_path / "run" / "encoder").encoder
    assert encoder(torch.zeros(1, 3, 48, 48)).shape == (1, 64)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["augmentation"] == "authors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_column": "label"}, "got 'label'; columns: picture, kind"),
        ({"train_split": "training"}, "train_split must be one of train, test, part of one"),
        ({"micro_batch_size": 5}, "2 images to compare, got micro_batch_size=5 and batch_size=16"),
        ({"optimizer": "adamx"}, "got 'adamx'"),
        ({"num_train_epochs": 0.01}, "at least one step, got 0.01 epochs of 4 steps"),
        ({"model_args": {"in_chans": 0}}, "in_chans must be a positive integer, got 0"),
        ({"model_args": {"depht": 2}}, "got {'depht': 2}"),
        ({"output_dir": "/dev/null/run"}, "output_dir must be a directory that can be"),
        ({"dataset_name": "EMPTY"}, "corresponds to no data"),
    ],
)
def test_bad_setting_is_one_sentence_before_training(
    images: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    settings = {
        "dataset_name": str(images), "architecture": "test_resnet", "batch_size": 16,
        "expander_dims": "32-32", "output_dir": str(tmp_path), "num_workers": 0,
    } | change  # fmt: skip
    if settings["dataset_name"] == "EMPTY":
        settings["dataset_name"] = str(write_images(tmp_path / "empty", rows=0))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pretrain(PretrainingArguments(**settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_settings_are_taken() -> None:
    with pytest.raises(ValueError, match="args must be PretrainingArguments, got 'demo'; Pretr"):
        pretrain("demo")  # pyright: ignore[reportArgumentType]


def test_command_line_prints_the_sentence_and_no_traceback(images: Path, tmp_path: Path) -> None:
    result = run_pretraining(*flags_of(images, tmp_path, "--batch_size=15"), processes=2)
    assert result.returncode == 1
    assert "error: batch_size must divide evenly over processes" in result.stderr
    assert "the nearest that does is 16" in result.stderr
    assert "Traceback" not in result.stderr
