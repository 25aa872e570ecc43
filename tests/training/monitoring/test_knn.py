"""What the kNN monitor measures, where, and how often it reads the images for it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict
from pictures import photographs, png, table_of
from torch import Tensor, nn
from warm import run_pretraining, run_script
from workflow import SMALL, metrics, write_images

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.features.encode import extract_features
from vicreg_hf.metrics.knn import knn_accuracy
from vicreg_hf.training.monitoring.knn import KNNMonitor

CPU, META = torch.device("cpu"), torch.device("meta")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BAD = (2, 11)


def labelled(images: Tensor | list[Tensor], name: str, bad: tuple[int, ...] = ()) -> ImageSplit:
    """Images and the photograph that each is a piece of."""
    cells: list[bytes | None] = [png(image) for image in images]
    for row in bad:
        cells[row] = b"<html>404</html>"
    table = table_of(cells, label=[k % 2 for k in range(len(images))])
    table = table.cast_column("label", ClassLabel(names=["temple", "flower"]))
    return image_split(DatasetDict({name: table}), name, dataset_name="pieces")


@pytest.fixture(scope="module")
def train() -> ImageSplit:
    return labelled(photographs(40, 32, 32), "train")


@pytest.fixture(scope="module")
def held_out() -> ImageSplit:
    return labelled(photographs(70, 32, 32)[40:], "test", BAD)


def monitor_of(train: ImageSplit, held_out: ImageSplit, **settings: Any) -> KNNMonitor:
    given = {"image_size": 32, "crop_pct": 1.0, "mean": MEAN, "std": STD, "num_workers": 0}
    images = load_in_memory(train)
    assert images is not None
    monitor = KNNMonitor.create(train, images, held_out, **given | settings)
    assert monitor is not None
    return monitor


def pixel_accuracy(train: ImageSplit, held_out: ImageSplit) -> float:
    """Of the images that can be used."""

    def features(split: ImageSplit) -> tuple[Tensor, Tensor]:
        images, bad = split.read_or_replace(range(len(split)))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        rows = [row for row in range(len(split)) if row not in {image.row for image in bad}]
        assert split.labels is not None
        x = ((torch.stack(images) / 255 - mean) / std).flatten(1)
        return x[rows], split.labels[rows]

    return knn_accuracy(*features(train), *features(held_out), k=20)


def test_pixels_are_compared_in_single_precision(train: ImageSplit, held_out: ImageSplit) -> None:
    expected = pixel_accuracy(train, held_out)
    assert monitor_of(train, held_out).pixels(CPU) == expected
    assert 0.5 < expected < 1


@pytest.mark.parametrize("sizes", ["of one size", "of several"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_cannot_be_used_are_neither_queries_nor_neighbours(
    in_memory: bool, sizes: str
) -> None:
    images: list[Tensor] = list(photographs(70, 32, 32))
    if sizes == "of several":
        images[45] = images[45][:, :, :30]
    train = labelled(images[:40], "train", (1, 5, 30))
    held_out = labelled(images[40:], "test", BAD)
    bad = BadImages(len(train), 1.0, None)
    stored = load_in_memory(train, bad=bad) if in_memory else None
    bad.agree(say=lambda _: None)
    monitor = KNNMonitor.create(
        train, train if stored is None else stored, held_out, image_size=32, crop_pct=1.0,
        mean=MEAN, std=STD, num_workers=0, bad=bad,
    )  # fmt: skip
    assert monitor is not None
    for _ in range(2):
        found = monitor.pixels(CPU)
        if sizes == "of one size":
            assert found == pixel_accuracy(train, held_out)
        assert monitor.description == (
            "20-NN accuracy on 28 images of pieces (test), neighbours from 37, without 5 that "
            "cannot be used"
        )


def test_images_without_a_class_are_neither_queries_nor_neighbours(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    assert train.labels is not None
    assert held_out.labels is not None
    fewer = torch.where(torch.arange(40) % 4 < 3, train.labels, -1)
    some = torch.where(torch.arange(30) % 3 == 0, held_out.labels, -1)
    partly = replace(train, labels=fewer), replace(held_out, labels=some)
    kept = [np.flatnonzero(labels.numpy() >= 0) for labels in (fewer, some)]
    alone = [
        replace(split, table=split.table.select(rows), labels=split.labels[rows])
        for split, rows in zip((train, held_out), kept, strict=True)
        if split.labels is not None
    ]
    monitor = monitor_of(*partly)
    assert monitor.pixels(CPU) == pixel_accuracy(alone[0], alone[1])
    assert monitor.description.startswith("20-NN accuracy on 10 images of pieces (test), neigh")
    assert monitor.description.endswith("neighbours from 30")


def test_a_class_may_be_missing_among_held_out_images(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    """Names are those that occur, where none are declared."""
    assert held_out.labels is not None
    flowers = np.flatnonzero(held_out.labels.numpy() == 1)
    table = held_out.table.select(flowers)
    zeros = torch.zeros(len(flowers), dtype=torch.long)
    own = replace(held_out, table=table, labels=zeros, label_names=("flower",))
    known = replace(held_out, table=table, labels=zeros + 1)
    assert monitor_of(train, own).pixels(CPU) == monitor_of(train, known).pixels(CPU)
    with pytest.raises(ValueError, match=r"only pieces \(test\) has flower; choose another"):
        monitor_of(replace(train, label_names=("temple", "tree")), own)


def test_pixels_are_compared_on_the_device_given(train: ImageSplit, held_out: ImageSplit) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        monitor_of(train, held_out).pixels(META)  # which does not compute


def test_pixels_of_large_images_are_not_compared(train: ImageSplit, held_out: ImageSplit) -> None:
    assert monitor_of(train, held_out, image_size=65).pixels(CPU) is None


# --- what stays in memory


class Counting(ImageSplit):
    """Counts the images that are decoded."""

    count = 0

    def decode(self, cell: Any) -> Tensor:
        self.count += 1
        return super().decode(cell)


def counting(split: ImageSplit) -> Counting:
    return Counting(split.table, split.column, split.name, split.labels, split.label_names)


class Small(nn.Module):
    """Representations of eight features, and of what dtype they were."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().mean((2, 3))
        self.dtypes.append(y.dtype)
        return y


def measured(monitor: KNNMonitor, **settings: Any) -> tuple[float, Tensor]:
    """Accuracy of kNN, and the representations of the held-out images."""
    seen: list[Tensor] = []

    def classify(y: Tensor) -> Tensor:
        seen.append(y)
        return y.argmax(1)

    return monitor.measure(Small(), CPU, classify, **settings)["knn"], seen[0]


@pytest.mark.parametrize("most", [30, 17])
@pytest.mark.parametrize(("image_size", "crop_pct"), [(32, 1.0), (24, 0.875), (80, 1.0)])
def test_small_held_out_images_are_decoded_once_and_seen_as_before(
    train: ImageSplit,
    held_out: ImageSplit,
    image_size: int,
    crop_pct: float,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vicreg_hf.training.monitoring.knn.MAX_TEST", most)
    split = counting(held_out)
    monitor = monitor_of(train, split, image_size=image_size, crop_pct=crop_pct)
    first, once = measured(monitor), split.count
    again = measured(monitor)
    assert split.count == once
    rows = monitor._rows(held_out, most)
    assert len(rows) == most
    batches = evaluation_batches(held_out, rows, image_size, crop_pct=crop_pct)
    expected = extract_features(Small(), batches, mean=MEAN, std=STD)
    expected = expected[[row not in BAD for row in rows]]
    for accuracy, y in (first, again):
        assert torch.equal(y, expected)
        assert accuracy == first[0]


@pytest.mark.parametrize(
    ("side", "other", "spare"),
    [(65, 65, 10**9), (32, 33, 10**9), (32, 32, -1)],  # large, of differing sizes, too many
)
def test_other_held_out_images_stay_encoded(
    train: ImageSplit, side: int, other: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*photographs(20, side, side), *photographs(1, other, other)]
    split = counting(labelled(images, "test"))
    budget = 40 * 3 * 32 * 32 + sum(image.nbytes for image in images)  # training images are 40
    monkeypatch.setattr("vicreg_hf.training.monitoring.knn.MEMORY_BUDGET", budget + spare)
    monitor = monitor_of(train, split)
    first, once = measured(monitor), split.count
    again = measured(monitor)
    assert split.count == once + len(images)
    assert torch.equal(first[1], again[1])
    assert first[0] == again[0]


# --- precision


def test_encoders_are_measured_in_the_precision_given(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    monitor, encoder = monitor_of(train, held_out), Small()
    for autocast, dtype in (
        (nullcontext, torch.float32),
        (lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
    ):
        encoder.dtypes.clear()
        monitor.measure(encoder, CPU, autocast=autocast)
        assert set(encoder.dtypes) == {dtype}
        assert not torch.is_autocast_enabled("cpu")


def test_weights_cast_for_one_batch_are_not_kept_for_the_next() -> None:
    encoder = Small()

    def batches() -> Any:
        for weight in (1.0, 2.0):
            nn.init.constant_(encoder.conv.weight, weight)
            yield torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)

    nn.init.zeros_(encoder.conv.bias)  # type: ignore[arg-type]
    y = extract_features(
        encoder, batches(), mean=[0.0] * 3, std=[1.0] * 3,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )  # fmt: skip
    assert torch.equal(y, torch.tensor([[27.0] * 8, [54.0] * 8]))


SPIED = """
import sys
from vicreg_hf import PretrainingArguments, pretrain
from vicreg_hf.training.monitoring import knn as monitor

seen, extract = set(), monitor.extract_features

def spied(encoder, *args, **settings):
    hook = encoder.register_forward_hook(lambda module, given, y: seen.add((type(module), y.dtype)))
    try:
        return extract(encoder, *args, **settings)
    finally:
        hook.remove()

monitor.extract_features = spied
pretrain(PretrainingArguments(
    architecture="test_resnet", expander_dims="8-8", batch_size=16, max_steps=1, num_workers=0,
    dataset_name=sys.argv[1], output_dir=sys.argv[2],
))
print(sorted(f"{kind.__name__}: {dtype}" for kind, dtype in seen))
"""


def test_a_run_measures_in_its_own_precision(tmp_path: Path) -> None:
    script, images = tmp_path / "spied.py", write_images(tmp_path / "images")
    script.write_text(SPIED)
    words = [str(script), str(images), str(tmp_path / "run")]
    result = run_script(*words, ACCELERATE_MIXED_PRECISION="bf16")
    assert result.returncode == 0, result.stderr
    assert "['Flatten: torch.float32', 'ResNet: torch.bfloat16']" in result.stdout


def test_measuring_changes_nothing_in_a_run_of_lower_precision(tmp_path: Path) -> None:
    images, losses = write_images(tmp_path / "images"), []
    for knn_steps in (1, 100):
        directory = tmp_path / str(knn_steps)
        flags = [*SMALL, f"--dataset_name={images}", "--max_steps=4", f"--knn_steps={knn_steps}"]
        result = run_pretraining(
            *flags, f"--output_dir={directory}", ACCELERATE_MIXED_PRECISION="bf16"
        )
        assert result.returncode == 0, result.stderr
        rows = metrics(directory)[1:]
        assert ["knn" in row for row in rows] == [knn_steps == 1] * 3 + [True]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]
