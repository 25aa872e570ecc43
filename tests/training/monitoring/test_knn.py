"""The kNN monitor: which images it measures, how, and how often it reads them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict
from gloo import GlooPool
from pictures import photographs, png, table_of
from torch import Tensor, nn

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.features.encode import extract_features
from vicreg_hf.metrics.knn import knn_accuracy
from vicreg_hf.runtime.distributed import rank
from vicreg_hf.runtime.signals import Stopped
from vicreg_hf.training.monitoring import knn
from vicreg_hf.training.monitoring.knn import KNNMonitor, missing_for_knn

CPU = torch.device("cpu")
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


def monitor_of(
    train: ImageSplit, held_out: ImageSplit, *, bad: BadImages | None = None,
    in_memory: bool = True, image_size: int = 32, crop_pct: float = 1.0,
) -> KNNMonitor:  # fmt: skip
    stored = load_in_memory(train, bad=bad) if in_memory else None
    if bad is not None:
        bad.agree(say=lambda _: None)
    monitor = KNNMonitor.create(
        train, train if stored is None else stored, held_out, image_size=image_size,
        crop_pct=crop_pct, mean=MEAN, std=STD, num_workers=0, bad=bad,
    )  # fmt: skip
    assert monitor is not None
    return monitor


def pixel_accuracy(train: ImageSplit, held_out: ImageSplit) -> float:
    """20-NN accuracy of the pixels of images that can be used, by `knn_accuracy`."""

    def features(split: ImageSplit) -> tuple[Tensor, Tensor]:
        images, bad = split.read_or_replace(range(len(split)))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        rows = [row for row in range(len(split)) if row not in {image.row for image in bad}]
        assert split.labels is not None
        x = ((torch.stack(images) / 255 - mean) / std).flatten(1)
        return x[rows], split.labels[rows]

    return knn_accuracy(*features(train), *features(held_out), k=20)


def test_pixels_of_small_images_are_compared_on_the_device(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    expected = pixel_accuracy(train, held_out)
    assert monitor_of(train, held_out).pixels(CPU) == expected
    assert 0.5 < expected < 1
    assert monitor_of(train, held_out, image_size=65).pixels(CPU) is None


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_cannot_be_used_are_neither_queries_nor_neighbours(in_memory: bool) -> None:
    images = photographs(70, 32, 32)
    train = labelled(images[:40], "train", (1, 5, 30))
    held_out = labelled(images[40:], "test", BAD)
    bad = BadImages(len(train), 1.0, None)
    monitor = monitor_of(train, held_out, bad=bad, in_memory=in_memory)
    for _ in range(2):
        assert monitor.pixels(CPU) == pixel_accuracy(train, held_out)
        assert monitor.description == (
            "20-NN accuracy on 28 images of pieces (test), neighbours from 37, without 5 that "
            "cannot be used"
        )


def test_images_without_a_class_are_neither_queries_nor_neighbours(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    partly, alone = [], []
    for split, count in ((train, 30), (held_out, 10)):
        assert split.labels is not None
        known = torch.arange(len(split)) < count
        partly.append(replace(split, labels=torch.where(known, split.labels, -1)))
        table = split.table.select(range(count))
        alone.append(replace(split, table=table, labels=split.labels[:count]))
    monitor = monitor_of(*partly)
    assert monitor.pixels(CPU) == pixel_accuracy(*alone)
    assert monitor.description.startswith("20-NN accuracy on 9 images of pieces (test), neigh")
    assert "neighbours from 30, without 1 that" in monitor.description


def leaving_one_out(split: ImageSplit, **more: Any) -> KNNMonitor | None:
    return KNNMonitor.create(
        split, split, None, image_size=32, crop_pct=1.0, mean=MEAN, std=STD, num_workers=0, **more
    )


def test_without_held_out_images_each_is_classified_by_the_others() -> None:
    bad = (3, 8)
    split = labelled(photographs(50, 32, 32), "train", bad)
    monitor = leaving_one_out(split)
    assert monitor is not None
    right = []
    for row in set(range(50)) - {*bad}:
        table, label = split.table, split.labels
        assert label is not None
        rest = [other for other in range(50) if other not in (row, *bad)]
        parts = [
            replace(split, table=table.select(own), labels=label[own]) for own in (rest, [row])
        ]
        right.append(pixel_accuracy(*parts))
    assert monitor.pixels(CPU) == pytest.approx(np.mean(right))
    assert 0.5 < np.mean(right) < 1
    kind = "by leave-one-out on training images, whose labels never reach the encoder"
    assert monitor.subject == f"pieces (train) {kind}"
    assert monitor.description == (
        f"20-NN accuracy of 48 images of pieces (train) {kind}, neighbours from 47 others, "
        "without 2 that cannot be used"
    )
    other = leaving_one_out(split, trained_on=False)
    assert other is not None
    assert other.subject == "pieces (train) by leave-one-out"


def test_leave_one_out_needs_two_classes_and_more_images_than_neighbours(
    train: ImageSplit,
) -> None:
    assert train.labels is not None
    alike = replace(train, labels=torch.zeros(40, dtype=torch.long))
    few = replace(train, labels=torch.where(torch.arange(40) < 20, train.labels, -1))
    for split, words in (
        (alike, "are of one class"),
        (few, "has 20 labelled images, fewer than th"),
    ):
        assert leaving_one_out(split) is None
        assert words in (missing_for_knn(split, None) or "")
    alone = leaving_one_out(replace(train, labels=train.labels.clone().index_fill_(
        0, torch.tensor([1]), 2), label_names=("temple", "flower", "tree")))  # fmt: skip
    assert alone is not None
    assert "1 of 40 images of pieces (train) are alone in their" in (alone.unlearnt or "")


def test_a_class_may_be_missing_among_held_out_images(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    """Class names are those that occur, where none are declared."""
    assert held_out.labels is not None
    flowers = np.flatnonzero(held_out.labels.numpy() == 1)
    table = held_out.table.select(flowers)
    zeros = torch.zeros(len(flowers), dtype=torch.long)
    own = replace(held_out, table=table, labels=zeros, label_names=("flower",))
    known = replace(held_out, table=table, labels=zeros + 1)
    assert monitor_of(train, own).pixels(CPU) == monitor_of(train, known).pixels(CPU)
    with pytest.raises(ValueError, match=r"only pieces \(test\) has flower; choose another"):
        monitor_of(replace(train, label_names=("temple", "tree")), own)


class Small(nn.Module):
    """Gives eight features, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(self.conv(x).relu().mean((2, 3)))
        return self.given[-1]


@pytest.mark.parametrize(
    ("image_size", "crop_pct", "side", "other", "spare", "once"),
    [
        (32, 1.0, 32, 32, 10**9, True),
        (24, 0.875, 32, 32, 10**9, True),
        (32, 1.0, 65, 65, 10**9, False),  # large
        (32, 1.0, 32, 33, 10**9, False),  # of differing sizes
        (32, 1.0, 32, 32, -1, False),  # too many
    ],
)
def test_small_held_out_images_are_decoded_once_and_all_are_seen_as_before(
    train: ImageSplit, image_size: int, crop_pct: float, side: int, other: int, spare: int,
    once: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    images = [*photographs(20, side, side), *photographs(1, other, other)]
    budget = 40 * 3 * 32 * 32 + 17 * images[0].nbytes  # training images are 40
    monkeypatch.setattr(knn, "MEMORY_BUDGET", budget + spare)
    monkeypatch.setattr(knn, "MAX_TEST", 17)
    held_out = labelled(images, "test", BAD)
    monitor = monitor_of(train, held_out, image_size=image_size, crop_pct=crop_pct)
    rows = monitor.held_out.rows
    assert len(rows) == 17
    batches = evaluation_batches(held_out, rows, image_size, crop_pct=crop_pct)
    expected = extract_features(Small(), batches, mean=MEAN, std=STD)
    expected = expected[[row not in BAD for row in rows]]
    seen: list[Tensor] = []
    accuracies = []
    for session in range(2):
        if session == 1 and once:  # the files are needed no more
            monkeypatch.setattr(ImageSplit, "decode", None)
        found = monitor.measure(Small(), CPU, lambda y: seen.append(y) or y.argmax(1))
        accuracies.append(found["knn"])
        assert torch.equal(seen[-1], expected)
    assert accuracies[0] == accuracies[1]
    assert isinstance(monitor.held_out.source, Tensor) == once


def measured_together(
    batch: int, *, raising: bool = False, classify: Any = lambda y: y.argmax(1)
) -> tuple[dict[str, float], list[int]]:
    """The accuracies, and how many images this process has encoded at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "AT_ONCE", batch)
        patch.setattr(knn, "QUERIES_AT_ONCE", batch)
        split = labelled(photographs(40, 32, 32), "train")
        monitor = monitor_of(split, labelled(photographs(70, 32, 32)[40:], "test", BAD))
        encoder = Small()

        def autocast() -> Any:
            if raising and rank() == 1:
                raise Stopped("asked")
            return nullcontext()

        found = monitor.measure(encoder, CPU, classify, autocast=autocast)
        return found, [len(y) for y in encoder.given]


def test_processes_share_images_and_queries_and_find_what_one_finds(gloo: GlooPool) -> None:
    """Images of both splits, 30 and 40, are encoded in batches that are those of one process."""
    alone, batches = measured_together(8)
    assert batches == [8, 8, 8, 6, 8, 8, 8, 8, 8]
    assert 0.5 < alone["knn"] < 1
    (first, own), (second, others) = gloo.run(2, measured_together, 8)
    assert first == second == alone
    assert (own, others) == ([8, 8, 8, 8], [8, 6, 8, 8, 8])
    # fewer batches than processes
    (first, own), (second, others) = gloo.run(2, measured_together, 100)
    assert first == second
    assert (own, others) == ([], [30, 40])


def stopped_together() -> str:
    with pytest.raises(Stopped) as error:
        measured_together(8, raising=True)
    return str(error.value)


def test_a_request_to_stop_one_process_ends_the_measurement_in_all(gloo: GlooPool) -> None:
    assert gloo.run(2, stopped_together) == ["The measurement was not finished.", "asked"]


def failed_together() -> str:
    def classify(y: Tensor) -> Tensor:
        if rank() == 1:
            raise RuntimeError("out of memory")
        return y.argmax(1)

    with pytest.raises(RuntimeError) as error:
        measured_together(8, classify=classify)
    return str(error.value)


def test_a_process_that_cannot_classify_ends_the_measurement_in_all(gloo: GlooPool) -> None:
    said = "another process has failed; its own message says why."
    assert gloo.run(2, failed_together) == [said, "out of memory"]


def test_encoders_are_measured_in_the_precision_given(
    train: ImageSplit, held_out: ImageSplit
) -> None:
    monitor = monitor_of(train, held_out)
    for autocast, dtype in (
        (nullcontext, torch.float32),
        (lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
    ):
        encoder = Small()
        monitor.measure(encoder, CPU, autocast=autocast)
        assert {y.dtype for y in encoder.given} == {dtype}
        assert not torch.is_autocast_enabled("cpu")


def test_weights_cast_for_one_batch_are_not_kept_for_the_next() -> None:
    encoder = Small()
    nn.init.constant_(encoder.conv.bias, 0.0)  # pyright: ignore[reportArgumentType]

    def batches() -> Any:
        for weight in (1.0, 2.0):
            nn.init.constant_(encoder.conv.weight, weight)
            yield torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)

    y = extract_features(
        encoder, batches(), mean=[0.0] * 3, std=[1.0] * 3,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )  # fmt: skip
    assert torch.equal(y, torch.tensor([[27.0] * 8, [54.0] * 8]))
