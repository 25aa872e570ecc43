"""Data sets found and read, and batches in an order that is a function of (seed, step)."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from pictures import photographs, png, split_of, table_of
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import centre_crop, evaluation_batches, training_views
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.crops import batches_ahead
from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.data.workers import LoadingError, loading_errors
from vicreg_hf.runtime.machine import default_num_workers
from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's home; the variable is read on import."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def grey_levels(views: tuple[Tensor, Tensor]) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (torch.stack(views) * std + mean) * 255


# --- in memory


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
@pytest.mark.parametrize("num_workers", [2, 8])
def test_the_number_of_workers_changes_nothing(split: ImageSplit, num_workers: int) -> None:
    alone = views_of(split, range(5))
    together = views_of(split, range(5), num_workers=num_workers)
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


ONE_VIEW: RandomViews[tuple[Tensor]] = RandomViews(24, (ViewRecipe(jitter=0, grayscale=0),), seed=1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_one_view_is_made_in_memory_by_workers_and_processes_alike(
    images: Tensor, split: ImageSplit, num_workers: int, world_size: int
) -> None:
    whole = []
    for step in range(3):
        epoch, rows = GlobalBatches(20, 8, seed=2).batch(step)
        whole += ONE_VIEW(images[rows], rows, epoch)
    for source in (images, split):
        parts = []
        for rank in range(world_size):
            batches = GlobalBatches(20, 8, seed=2, rank=rank, world_size=world_size)
            made = training_views(
                source, batches, ONE_VIEW, steps=range(3), device=CPU, num_workers=num_workers
            )
            parts.append([x for (x,) in made])
        for step, expected in enumerate(whole):
            apart = (torch.cat([part[step] for part in parts]) - expected).abs()
            assert apart.max() < 2.01 / (255 * 0.224)  # two grey levels


@pytest.mark.parametrize(
    ("num_images", "image_sizes", "num_workers", "expected"),
    [
        (512, [224, 224], 15, 1),  # imagenet-r50-100ep on one GPU: 154 MB * 15 > 2 GiB
        (512, [224, 224], 4, 3),  # 154 MB * 4 * 3 < 2 GiB
        (64, [224, 224], 15, 4),  # its share of eight
        (512, [224, 224] + [96] * 6, 8, 1),  # 239 MB * 8 * 2 > 2 GiB
        (512, [224, 224] + [96] * 6, 4, 2),
        (10**6, [224], 1, 1),
    ],
)
def test_large_batches_are_made_fewer_ahead(
    num_images: int, image_sizes: list[int], num_workers: int, expected: int
) -> None:
    batch_bytes = num_images * 3 * sum(side**2 for side in image_sizes)
    assert batches_ahead(batch_bytes, num_workers) == expected


@pytest.mark.parametrize("room", [1, 3])
def test_workers_make_as_many_batches_ahead_as_there_is_room_for(
    split: ImageSplit, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[Any] = []

    def spied(*args: Any, **settings: Any) -> Any:
        loaders.append(DataLoader(*args, **settings))
        return loaders[-1]

    views_of_a_step = sum(crops.nbytes for crops in VIEWS.crop(split.read(range(8)), range(8)))
    monkeypatch.setattr("vicreg_hf.data.crops.BYTES_AHEAD", room * 2 * views_of_a_step)
    monkeypatch.setattr("vicreg_hf.data.crops.DataLoader", spied)
    views_of(split, range(5), num_workers=2)
    assert [loader.prefetch_factor for loader in loaders] == [room]


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


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_connection_that_breaks_is_a_worker_that_died(error: Exception) -> None:
    """What torch raises of a worker that is killed while it passes a batch on."""
    sentence = r"worker died: the connection .*--num_workers 0"
    with pytest.raises(LoadingError, match=sentence), loading_errors():
        raise error


class DiesAtStep2(TwoViews):
    """In a worker; views elsewhere."""

    def crop(self, images: Any, indices: Any, epoch: Any = 0) -> Any:
        if torch.utils.data.get_worker_info() is not None and epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().crop(images, indices, epoch)


def test_a_worker_that_is_killed_is_said_to_have_died(split: ImageSplit) -> None:
    batches, views = GlobalBatches(20, 8, seed=2), DiesAtStep2(image_size=24)
    # torch's signal handler raises wherever the main process is: also between two batches
    with (
        pytest.raises(LoadingError, match=r"worker died: .*Killed.*lower --num_workers"),
        loading_errors(),
    ):
        for _ in training_views(split, batches, views, steps=range(6), device=CPU, num_workers=1):
            pass


def test_a_worker_goes_on_when_its_process_group_is_told_to_end(split: ImageSplit) -> None:
    """As by `timeout`, and by schedulers; it ends with what needs it, and at once."""
    others = set(multiprocessing.active_children())  # of earlier tests
    batches = evaluation_batches(split, np.arange(20), 24, batch_size=2, num_workers=1)
    made = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - others
    status = Path(f"/proc/{worker.pid}/status").read_text()
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        assert ignored >> (number - 1) & 1
        os.kill(worker.pid or 0, number)
    assert len([*made, *batches]) == 10
    assert not worker.is_alive()


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
