"""Data sets found and read, and batches in an order that is a function of (seed, step)."""

from __future__ import annotations

import io
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vicreg_hf.bad_images import BadImages
from vicreg_hf.columns import find_image_column, find_label_column
from vicreg_hf.data import (
    LoadingError,
    centre_crop,
    default_num_workers,
    evaluation_batches,
    load_in_memory,
    training_views,
)
from vicreg_hf.images import ImageError
from vicreg_hf.sampler import GlobalBatches
from vicreg_hf.sources import ImageSplit, held_out_split, image_split, open_dataset
from vicreg_hf.views import TwoViews

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's home; the variable is read on import."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def photographs(count: int = 20, height: int = 40, width: int = 48) -> Tensor:
    """(count, 3, height, width) uint8 pieces of two photographs."""
    bundle: Any = load_sample_images()
    random = np.random.default_rng(0)
    pieces = []
    for k in range(count):
        y, x = random.integers(427 - height), random.integers(640 - width)
        pieces.append(bundle.images[k % 2][y : y + height, x : x + width])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def table_of(cells: list[bytes | None], **columns: list[Any]) -> Dataset:
    features = {"image": ImageFeature()} | {
        name: Value("string" if isinstance(values[0], str) else "int64")
        for name, values in columns.items()
    }
    rows = [None if cell is None else {"bytes": cell, "path": None} for cell in cells]
    return Dataset.from_dict({"image": rows, **columns}, features=Features(features))


def split_of(images: Tensor | list[Tensor]) -> ImageSplit:
    table = table_of([png(image) for image in images])
    return image_split(DatasetDict({"train": table}), "train", dataset_name="photographs")


def grey_levels(views: tuple[Tensor, Tensor]) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (torch.stack(views) * std + mean) * 255


# --- opening


def test_a_folder_of_parquet_files_gives_its_splits(tmp_path: Path) -> None:
    images = photographs(3)
    for name, rows in (("train", images), ("test", images[:1])):
        table_of([png(image) for image in rows]).to_parquet(tmp_path / f"{name}.parquet")
    splits = open_dataset(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 1}
    read = image_split(splits, "train", dataset_name=str(tmp_path)).read([2, 0])
    torch.testing.assert_close(torch.stack(read), images[[2, 0]], rtol=0, atol=0)


def test_class_folders_of_images_give_labels(tmp_path: Path) -> None:
    images = photographs(4)
    for row, folder in enumerate(["tulip", "china", "tulip", "china"]):
        path = tmp_path / folder / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(images[row]))
    split = image_split(open_dataset(str(tmp_path)), "train", dataset_name="flowers")
    assert split.label_names == ("china", "tulip")
    assert split.labels is not None
    by_class = {0: images[[1, 3]], 1: images[[0, 2]]}
    for row, label in enumerate(split.labels.tolist()):
        (read,) = split.read([row])
        assert any(torch.equal(read, image) for image in by_class[label])
    assert sorted(split.labels.tolist()) == [0, 0, 1, 1]


def test_a_folder_of_images_alone_has_no_labels(tmp_path: Path) -> None:
    for row, image in enumerate(photographs(3)):
        (tmp_path / f"{row}.png").write_bytes(png(image))
    split = image_split(open_dataset(str(tmp_path)), "train", dataset_name="photographs")
    assert len(split) == 3
    assert split.labels is None
    assert split.label_names == ()


def test_what_save_to_disk_wrote_is_opened(tmp_path: Path) -> None:
    table = table_of([png(image) for image in photographs(3)])
    DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(tmp_path / "both")
    splits = open_dataset(str(tmp_path / "both"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 1}


def test_a_single_table_on_disk_becomes_the_split_train(tmp_path: Path) -> None:
    table_of([png(image) for image in photographs(3)]).save_to_disk(tmp_path / "one")
    splits = open_dataset(str(tmp_path / "one"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3}


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_data_is_named(tmp_path: Path, name: str) -> None:
    folder = str(tmp_path / name)
    with pytest.raises(ValueError, match=f"dataset_name must be .* got '{re.escape(folder)}'"):
        open_dataset(folder)


# --- columns and splits

FEATURES = Features(
    {
        "photo": ImageFeature(),
        "mask": ImageFeature(),
        "kind": ClassLabel(names=["a", "b"]),
        "author": Value("string"),
    }
)


def without(*names: str) -> Features:
    return Features({name: kind for name, kind in FEATURES.items() if name not in names})


def test_the_only_image_column_is_found() -> None:
    assert find_image_column(without("mask"), None) == "photo"


def test_the_image_column_asked_for_is_taken() -> None:
    assert find_image_column(FEATURES, "mask") == "mask"


@pytest.mark.parametrize(
    ("features", "wanted", "message"),
    [
        (FEATURES, None, "got 2; columns of images: photo, mask; all: photo, mask, kind, author"),
        (without("photo", "mask"), None, "got 0; columns of images: none; all: kind, author"),
        (FEATURES, "img", "got 'img'; columns of images: photo, mask; all: photo, mask, kind"),
        (FEATURES, "author", "got 'author'; columns of images: photo, mask; all: photo"),
    ],
)
def test_an_unclear_image_column_is_answered_with_all_columns(
    features: Features, wanted: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_image_column(features, wanted)


@pytest.mark.parametrize(
    ("features", "wanted", "expected"),
    [
        (FEATURES, None, "kind"),
        (FEATURES, "author", "author"),
        (without("kind"), None, None),
        (Features({**FEATURES, "other": ClassLabel(names=["c"])}), None, None),
    ],
)
def test_the_label_column_is_the_one_asked_for_or_the_only_one(
    features: Features, wanted: str | None, expected: str | None
) -> None:
    assert find_label_column(features, wanted) == expected


def test_a_missing_label_column_is_answered_with_all_columns() -> None:
    with pytest.raises(ValueError, match="got 'label'; columns: photo, mask, kind, author"):
        find_label_column(FEATURES, "label")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("validation", "split must be one of train, empty, got 'validation'"),
        ("empty", "must have rows, got none in split 'empty' of flowers"),
    ],
)
def test_a_missing_or_empty_split_is_named(name: str, message: str) -> None:
    table = table_of([png(photographs(1)[0])])
    splits = DatasetDict({"train": table, "empty": table.select([])})
    with pytest.raises(ValueError, match=message):
        image_split(splits, name, dataset_name="flowers")


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        (["tulip", "china", "tulip"], [1, 0, 1], ("china", "tulip")),
        ([7, 3, 40], [1, 0, 2], ("3", "7", "40")),
        ([-1, 1, -1], [0, 1, 0], ("-1", "1")),
    ],
)
def test_labels_of_any_kind_become_classes_from_0(
    labels: list[Any], classes: list[int], names: tuple[str, ...]
) -> None:
    table = table_of([png(image) for image in photographs(3)], kind=labels)
    split = image_split(
        DatasetDict({"train": table}), "train", dataset_name="flowers", label_column="kind"
    )
    assert split.labels is not None
    torch.testing.assert_close(split.labels, torch.tensor(classes))
    assert split.label_names == names


CLASSES = ClassLabel(names=["china", "tulip"])


@pytest.fixture(
    params=[(Value("string"), None), (CLASSES, None), (CLASSES, -1)],
    ids=["string-null", "class-null", "class-minus-one"],
)
def partly_labelled(request: pytest.FixtureRequest) -> DatasetDict:
    """Two rows, one of them without a class: null, or the Hub's -1."""
    kind, nothing = request.param
    rows = {"image": [{"bytes": b"", "path": None}] * 2, "kind": ["tulip", nothing]}
    features = Features({"image": ImageFeature(), "kind": kind})
    return DatasetDict({"train": Dataset.from_dict(rows, features=features)})


def test_a_missing_label_in_the_column_asked_for_is_refused(partly_labelled: DatasetDict) -> None:
    with pytest.raises(ValueError, match=r"rows of flowers \(train\) without one in 'kind'"):
        image_split(partly_labelled, "train", dataset_name="flowers", label_column="kind")


def test_a_column_with_missing_labels_is_not_taken_unasked(partly_labelled: DatasetDict) -> None:
    split = image_split(partly_labelled, "train", dataset_name="flowers")
    assert split.labels is None
    assert split.label_names == ()


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["train", "validation", "test"], None, "test"),
        (["train", "validation"], None, "validation"),
        (["train"], None, None),
        (["test"], None, None),  # trained on
        (["train", "test", "extra"], "extra", "extra"),
    ],
)
def test_the_held_out_split_is_never_the_training_split(
    names: list[str], wanted: str | None, expected: str | None
) -> None:
    splits = DatasetDict(dict.fromkeys(names, labelled()))
    found, name = held_out_split(splits, wanted, names[0], dataset_name="flowers")
    assert name == expected
    assert (found is None) == (expected is None)


def test_an_unlabelled_test_split_does_not_hide_the_validation_split() -> None:
    table = labelled()
    hidden = table.map(lambda _: {"label": -1})
    splits = DatasetDict({"train": table, "test": hidden, "validation": table})
    assert held_out_split(splits, None, "train", dataset_name="flowers")[1] == "validation"


def labelled() -> Dataset:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["rose", "tulip"])})
    cells = [{"bytes": b"", "path": None}] * 2
    return Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)


# --- reading


@pytest.mark.parametrize("cell", [None, b"", b"<html>404</html>"])
def test_a_bad_image_names_its_row(cell: bytes | None) -> None:
    good = png(photographs(1)[0])
    splits = DatasetDict({"train": table_of([good, good, cell, good])})
    split = image_split(splits, "train", dataset_name="flowers")
    assert len(split.read([0, 1, 3])) == 3
    with pytest.raises(ImageError, match=r"row 2 of flowers \(train\), column image: the image"):
        split.read([3, 2])


def test_images_of_one_size_are_loaded_into_memory() -> None:
    images = photographs(6).repeat(50, 1, 1, 1)  # more than are decoded at a time
    loaded = load_in_memory(split_of(images))
    assert loaded is not None
    torch.testing.assert_close(loaded, images, rtol=0, atol=0)


def test_images_of_differing_sizes_stay_encoded() -> None:
    images = [*photographs(3), *photographs(1, height=41)]
    assert load_in_memory(split_of(images)) is None


@pytest.mark.parametrize(("spare", "loaded"), [(0, True), (-1, False)])
def test_images_over_the_budget_stay_encoded(spare: int, loaded: bool) -> None:
    split = split_of(photographs(4))
    assert (load_in_memory(split, budget=4 * 3 * 40 * 48 + spare) is not None) == loaded


# --- the sampler


def test_an_epoch_visits_no_sample_twice_and_drops_the_last_part() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    assert batches.steps_per_epoch == 5
    for epoch in range(3):
        steps = range(5 * epoch, 5 * epoch + 5)
        assert [batches.batch(step)[0] for step in steps] == [epoch] * 5
        rows = np.concatenate([batches.batch(step)[1] for step in steps])
        assert len(np.unique(rows)) == 20
        assert rows.min() >= 0
        assert rows.max() < 22


def test_every_sample_comes_in_some_epoch() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    seen = np.concatenate([batches.batch(step)[1] for step in range(5 * 5)])
    np.testing.assert_array_equal(np.unique(seen), np.arange(22))


@pytest.mark.parametrize("change", ["epoch", "seed"])
def test_epochs_and_seeds_have_their_own_order(change: str) -> None:
    first = GlobalBatches(64, 64, seed=0).batch(0)[1]
    other = (
        GlobalBatches(64, 64, seed=0).batch(1)[1]
        if change == "epoch"
        else GlobalBatches(64, 64, seed=1).batch(0)[1]
    )
    assert (first != other).any()
    np.testing.assert_array_equal(np.sort(first), np.sort(other))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("micro_batch_size", [6, 12, 18])
def test_micro_batches_are_the_same_rows_on_any_number_of_processes(
    world_size: int, micro_batch_size: int
) -> None:
    whole = GlobalBatches(100, 30, seed=3).batch(4)[1]
    parts = [
        GlobalBatches(
            100, 30, seed=3, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size
        ).batch(4)[1]
        for rank in range(world_size)
    ]
    share = micro_batch_size // world_size
    for start, local in zip(range(0, 30, micro_batch_size), range(0, 30, share), strict=False):
        rows = np.concatenate([part[local : local + share] for part in parts])
        np.testing.assert_array_equal(rows, whole[start : start + micro_batch_size])


def test_micro_batches_that_processes_cannot_share_are_refused() -> None:
    message = "got micro_batch_size=5 and num_processes=2; the nearest that does is 4"
    with pytest.raises(ValueError, match=message):
        GlobalBatches(100, 12, seed=0, world_size=2, micro_batch_size=5)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_rows_of_the_ranks_make_the_global_batch(world_size: int) -> None:
    whole = GlobalBatches(100, 12, seed=3)
    parts = [
        GlobalBatches(100, 12, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 7, 8, 100):
        rows = np.concatenate([part.batch(step)[1] for part in parts])
        np.testing.assert_array_equal(rows, whole.batch(step)[1])
        assert {part.batch(step)[0] for part in parts} == {whole.batch(step)[0]}


def test_a_batch_is_a_function_of_its_step_alone() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    forward = [batches.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        for asked in (batches, GlobalBatches(22, 4, seed=0)):
            epoch, rows = asked.batch(step)
            assert epoch == forward[step][0]
            np.testing.assert_array_equal(rows, forward[step][1])


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "message"),
    [
        (10, 16, 1, "got batch_size=16 and 10 images; use at most 10"),
        (100, 18, 4, "got batch_size=18 and num_processes=4; the nearest that does is 16"),
        (100, 19, 4, "got batch_size=19 and num_processes=4; the nearest that does is 20"),
        (100, 4, 4, "got batch_size=4 and num_processes=4; use at least 8"),
        (100, 3, 4, "got batch_size=3 and num_processes=4; .* 8"),
        (11, 11, 4, "got batch_size=11 and num_processes=4; the nearest that does is 8"),
        (10, 16, 4, "got batch_size=16 and 10 images; use at most 8"),
    ],
)
def test_an_impossible_batch_is_answered_with_the_nearest_possible(
    num_samples: int, batch_size: int, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GlobalBatches(num_samples, batch_size, seed=0, world_size=world_size)
    offered = int(re.findall(r"\d+", str(error.value))[-1])
    assert GlobalBatches(num_samples, offered, seed=0, world_size=world_size).steps_per_epoch >= 1


@pytest.mark.parametrize("batch_size", [8, 4, 6, 16])
def test_fewer_than_two_images_per_process_are_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"at least 2 images per process, got 7 .*processes=4"):
        GlobalBatches(7, batch_size, seed=0, world_size=4)


# --- views of training

VIEWS = TwoViews(image_size=24, preset="paper", seed=1)


def views_of(
    images: ImageSplit | Tensor,
    steps: range,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[Tensor]:
    """The grey levels (2, B, 3, S, S) of every step."""
    batches = GlobalBatches(len(images), 8, seed=2, rank=rank, world_size=world_size)
    training = training_views(
        images, batches, VIEWS, steps=steps, device=CPU, num_workers=num_workers
    )
    return [grey_levels(views) for views in training]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return photographs(20)


@pytest.fixture(scope="module")
def split(images: Tensor) -> ImageSplit:
    return split_of(images)


def test_views_are_those_of_the_samplers_rows(images: Tensor) -> None:
    batches = GlobalBatches(20, 8, seed=2)
    for step, views in enumerate(views_of(images, range(5))):
        epoch, rows = batches.batch(step)
        expected = grey_levels(VIEWS(images[rows], rows, epoch))
        torch.testing.assert_close(views, expected, rtol=0, atol=0)


def test_the_number_of_workers_changes_nothing(split: ImageSplit) -> None:
    alone, together = views_of(split, range(5)), views_of(split, range(5), num_workers=2)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_late_resumes_exactly(split: ImageSplit, num_workers: int) -> None:
    late = views_of(split, range(3, 5), num_workers=num_workers)
    torch.testing.assert_close(late, views_of(split, range(5))[3:], rtol=0, atol=0)


def test_starting_late_in_memory_resumes_exactly(images: Tensor) -> None:
    late = views_of(images, range(3, 5))
    torch.testing.assert_close(late, views_of(images, range(5))[3:], rtol=0, atol=0)


def test_processes_share_the_views_of_one(images: Tensor, split: ImageSplit) -> None:
    for source in (images, split):
        parts = [views_of(source, range(3), rank=rank, world_size=2) for rank in (0, 1)]
        for step, whole in enumerate(views_of(source, range(3))):
            shared = torch.cat([part[step] for part in parts], 1)
            torch.testing.assert_close(shared, whole, rtol=0, atol=1.01)
            assert (shared - whole).abs().mean() < 1e-3


def test_memory_and_workers_give_the_same_views(images: Tensor, split: ImageSplit) -> None:
    in_memory, decoded = torch.stack(views_of(images, range(5))), views_of(split, range(5))
    apart = (in_memory - torch.stack(decoded)).abs()
    assert (apart > 2.01).float().mean() < 1e-3  # jitter stretches a crop's rounding here and there
    assert apart.mean() < 0.05
    assert apart.max() < 12


BAD = (3, 13, 14)


@pytest.fixture(scope="module")
def damaged(images: Tensor) -> ImageSplit:
    cells: list[bytes | None] = [png(image) for image in images]
    for row, data in zip(BAD, (b"<html>404</html>", b"", None), strict=True):
        cells[row] = data
    return image_split(DatasetDict({"train": table_of(cells)}), "train", dataset_name="flowers")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_and_named_whoever_reads_it(
    damaged: ImageSplit, num_workers: int
) -> None:
    batches, bad = GlobalBatches(20, 8, seed=2), BadImages(20, 1.0, None)
    in_memory = load_in_memory(damaged)
    assert in_memory is not None
    training = training_views(
        damaged, batches, VIEWS, steps=range(5), device=CPU, num_workers=num_workers, bad=bad
    )
    for views, expected in zip(training, views_of(in_memory, range(5)), strict=True):
        apart = (grey_levels(views) - expected).abs()
        assert apart.mean() < 0.05
    said: list[str] = []
    bad.agree(say=said.append)
    assert {image.row for image in bad.found} == set(BAD)
    assert re.search(r"3 images could not be used and were replaced; .* row \d+: ", said[0])


def test_what_replaces_a_bad_image_depends_on_its_row_alone(
    damaged: ImageSplit, images: Tensor
) -> None:
    alone = [damaged.read_or_replace([row])[0][0] for row in range(20)]
    together, bad = damaged.read_or_replace(range(20))
    torch.testing.assert_close(torch.stack(together), torch.stack(alone), rtol=0, atol=0)
    assert {image.row for image in bad} == set(BAD)
    for row, image in enumerate(together):
        sources = [k for k in range(20) if torch.equal(images[k], image)]
        assert (sources == [row]) == (row not in BAD)
        assert len(sources) == 1


def test_where_nothing_can_be_used_the_first_row_is_named() -> None:
    splits = DatasetDict({"train": table_of([b"", b"", b""])})
    split = image_split(splits, "train", dataset_name="flowers")
    with pytest.raises(ImageError, match=r"row 1 of flowers \(train\), column image: the image is"):
        split.read_or_replace([1])


class DiesAtStep2(TwoViews):
    """In a worker; views elsewhere."""

    def crop(self, images: Any, indices: Any, epoch: Any = 0) -> Any:
        if torch.utils.data.get_worker_info() is not None and epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().crop(images, indices, epoch)


def test_a_worker_that_is_killed_is_said_to_have_died(split: ImageSplit) -> None:
    batches, views = GlobalBatches(20, 8, seed=2), DiesAtStep2(image_size=24)
    with pytest.raises(LoadingError, match=r"worker died: .*Killed.*lower --num_workers"):
        for _ in training_views(split, batches, views, steps=range(6), device=CPU, num_workers=1):
            pass


# --- evaluation


@pytest.mark.parametrize(
    ("height", "width", "image_size", "crop_pct"),
    [(40, 60, 24, 0.875), (60, 40, 24, 0.875), (50, 51, 32, 1.0), (32, 32, 32, 0.9)],
)
def test_the_evaluation_view_is_pils_resize_and_central_crop(
    height: int, width: int, image_size: int, crop_pct: float
) -> None:
    (image,) = photographs(1, height, width)
    resized = tv.resize(
        Image.fromarray(image.permute(1, 2, 0).numpy()),  # type: ignore[arg-type]
        [int(image_size / crop_pct)],
        InterpolationMode.BICUBIC,
    )
    expected = tv.pil_to_tensor(tv.center_crop(resized, [image_size, image_size]))
    apart = centre_crop(image, image_size, crop_pct).int() - expected.int()
    assert apart.abs().max() <= 2
    assert apart.abs().float().mean() <= 0.5


def test_images_of_the_size_asked_for_are_not_resampled(images: Tensor) -> None:
    square = images[:, :, :40, :40]
    torch.testing.assert_close(centre_crop(square, 40, 1.0), square, rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_keep_the_order_of_the_rows(
    images: Tensor, split: ImageSplit, num_workers: int
) -> None:
    rows = np.array([5, 0, 19, 3, 3])
    expected = torch.stack([centre_crop(images[row], 24, 0.875) for row in rows])
    for source in (images, split):
        given = list(evaluation_batches(source, rows, 24, batch_size=2, num_workers=num_workers))
        assert [len(batch) for batch in given] == [2, 2, 1]
        torch.testing.assert_close(torch.cat(given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_processes", [1, 2, 10_000])
def test_every_process_gets_a_reasonable_number_of_workers(num_processes: int) -> None:
    assert 1 <= default_num_workers(num_processes) <= 16
