"""Views of training and of evaluation: the same ones from memory, workers and processes."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from gloo import GlooPool
from pictures import photographs, png, split_of, table_of
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from vicreg_hf.data import memory
from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import centre_crop, evaluation_batches, training_views
from vicreg_hf.data.columns.base import ImageError
from vicreg_hf.data.crops import StepCrops
from vicreg_hf.data.memory import common_side, load_in_memory
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import ImageSplit, image_split
from vicreg_hf.runtime.distributed import rank, wait_for_all
from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews

CPU = torch.device("cpu")
VIEWS = TwoViews(image_size=24, preset="paper", seed=1)
ONE_VIEW: RandomViews[tuple[Tensor]] = RandomViews(24, (ViewRecipe(jitter=0, grayscale=0),), seed=1)


def levels_of(
    source: ImageSplit | Tensor, steps: range, views: Any = VIEWS, rank: int = 0, **settings: Any
) -> list[Tensor]:
    """The gray levels (V, B, 3, S, S) of every step."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    world_size = settings.pop("world_size", 1)
    batches = GlobalBatches(len(source), 8, seed=2, rank=rank, world_size=world_size)
    made = training_views(source, batches, views, steps=steps, device=CPU, **settings)
    return [(torch.stack(each) * std + mean) * 255 for each in made]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return photographs(20)


@pytest.fixture(scope="module")
def split(images: Tensor) -> ImageSplit:
    return split_of(images)


# --- in memory


def test_images_of_one_size_within_the_budget_are_loaded_into_memory() -> None:
    images = photographs(6, 20, 24).repeat(50, 1, 1, 1)  # more than are decoded at a time
    split = split_of(images)
    for rows in (None, np.array([7, 0])):
        loaded = load_in_memory(split, rows=rows)
        assert loaded is not None
        assert torch.equal(loaded, images if rows is None else images[rows])
    size = 300 * 3 * 20 * 24
    assert load_in_memory(split, budget=size) is not None
    assert load_in_memory(split, budget=size - 1) is None
    assert common_side(split) is None


def test_images_of_differing_sizes_stay_encoded() -> None:
    squares = list(photographs(3, 40, 40))
    assert common_side(split_of(squares)) == 40
    differing = split_of([*squares, *photographs(1, 41, 40)])
    assert load_in_memory(differing) is None
    assert common_side(differing) is None
    assert common_side(split_of(photographs(2, 65, 65))) is None


class Shared(NamedTuple):
    """What one of several processes has of images in memory."""

    images: Tensor
    files: set[str]
    """The device and inode of each file without a name that is mapped."""
    decoded: int
    bad: list[int | None]
    told: bytes
    """The first pixels, once the first process has written its greeting there."""
    said: str


def share_images(*, possible: bool = True) -> Shared:
    cells: list[bytes | None] = [png(image) for image in photographs(12, 20, 24)]
    cells[3] = b"<html>404</html>"
    split = image_split(DatasetDict({"a": table_of(cells)}), "a", dataset_name="pieces")
    bad, decoded, decode = BadImages(None, 1.0, None), [], ImageSplit.decode
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(ImageSplit, "decode", lambda *args: decoded.append(1) or decode(*args))
        if not possible:
            patch.delattr(os, "memfd_create")
        images = load_in_memory(split, bad=bad)
    assert images is not None
    bad.agree(say=lambda _: None)
    kept = images.clone()
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {" ".join(line.split()[3:5]) for line in lines if "/memfd:vicreg_hf" in line}
    wait_for_all()  # until every process has copied the images, as the greeting overwrites some
    if rank() == 0:
        images.view(-1)[:5] = torch.frombuffer(bytearray(b"hello"), dtype=torch.uint8)
    wait_for_all()
    told = bytes(images.view(-1)[:5].tolist())
    rows = [image.row for image in bad.found]
    return Shared(kept, files, len(decoded), rows, told, said.getvalue())


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memory files")
def test_processes_of_a_machine_decode_once_and_share_the_memory(gloo: GlooPool) -> None:
    alone = share_images()
    assert not alone.files
    first, second = gloo.run(2, share_images)
    assert torch.equal(first.images, alone.images)
    assert torch.equal(second.images, alone.images)
    assert first.bad == second.bad == alone.bad == [3]
    assert (first.decoded, second.decoded) == (alone.decoded, 0)
    assert len(first.files) == 1
    assert first.files == second.files
    assert first.told == second.told == b"hello"
    assert first.said == second.said == ""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux's memory files")
def test_each_process_has_its_own_copy_where_memory_cannot_be_shared(gloo: GlooPool) -> None:
    first, second = gloo.run(2, partial(share_images, possible=False))
    assert torch.equal(first.images, second.images)
    assert first.bad == second.bad == [3]
    assert first.told == b"hello" != second.told
    assert (first.said, second.said.count("keeps its own copy of 0 MiB: this system")) == ("", 1)


def look_where_one_machine_cannot_read(side: int) -> tuple[int | None, bool]:
    """What two machines find, of which the second cannot read the images of a side."""
    split = split_of([*photographs(8, 20, 20), *photographs(8, 24, 24)])
    decode = ImageSplit.decode

    def decode_some(*args: Any) -> Any:
        image = decode(*args)
        if image.shape[-1] == side and rank() == 1:
            raise ImageError("the connection was lost")
        return image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_machine", lambda: str(rank()))
        patch.setattr(ImageSplit, "decode", decode_some)
        found = common_side(split)
        images = None if found is None else load_in_memory(split)
    return found, images is None


@pytest.mark.parametrize("side", [20, 24])
def test_an_image_that_one_machine_cannot_read_divides_no_processes(
    gloo: GlooPool, side: int
) -> None:
    """The second sees images of one size alone, in the place of those that it cannot read."""
    assert gloo.run(2, look_where_one_machine_cannot_read, side) == [(20, True)] * 2


def test_a_file_of_another_identity_is_not_opened(tmp_path: Path) -> None:
    offer = memory._Offer((1, 3, 2, 2), [], str(tmp_path), (0, 0))
    with pytest.raises(OSError, match="is another file in this process"):
        offer.map()


# --- views of training


def test_views_are_those_of_the_samplers_rows(images: Tensor) -> None:
    batches = GlobalBatches(20, 8, seed=2)
    made = training_views(images, batches, VIEWS, steps=range(5), device=CPU)
    for step, views in enumerate(made):
        epoch, rows = batches.batch(step)
        assert all(map(torch.equal, views, VIEWS(images[rows], rows, epoch)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_and_starting_late_change_nothing(images: Tensor, split: ImageSplit) -> None:
    for source, workers in ((images, (0,)), (split, (0, 2, 3))):
        every = levels_of(source, range(5))
        for num_workers in workers:
            late = levels_of(source, range(2, 5), num_workers=num_workers)
            assert all(map(torch.equal, late, every[2:]))


@pytest.mark.parametrize("views", [VIEWS, ONE_VIEW], ids=["two views", "one view"])
def test_memory_workers_and_processes_give_the_same_views(
    images: Tensor, split: ImageSplit, views: Any
) -> None:
    whole = torch.stack(levels_of(images, range(3), views))
    for source, num_workers in ((images, 0), (split, 0), (split, 2)):
        ranks = [
            levels_of(source, range(3), views, rank, world_size=2, num_workers=num_workers)
            for rank in (0, 1)
        ]
        shared = torch.stack([torch.cat(parts, 1) for parts in zip(*ranks, strict=True)])
        apart = (shared - whole).abs()
        # crops are rounded to whole levels, which jitter stretches here and there
        assert apart.mean() < 0.05
        assert (apart > 2.01).float().mean() < (1e-3 if views is VIEWS else 1e-9)
        assert apart.max() < 12


def test_memory_workers_and_processes_give_the_same_places(
    images: Tensor, split: ImageSplit
) -> None:
    views = TwoViews(image_size=24, preset="paper", seed=1, places=True)
    found = []
    for source, num_workers, world_size in ((images, 0, 1), (images, 0, 2), (split, 2, 2)):
        ranks = [
            training_views(
                source, GlobalBatches(20, 8, seed=2, rank=rank, world_size=world_size), views,
                steps=range(1, 4), device=CPU, num_workers=num_workers,
            ) for rank in range(world_size)
        ]  # fmt: skip
        found.append([torch.cat([part[2] for part in parts]) for parts in zip(*ranks, strict=True)])
    assert all(places.shape == (8, 2, 5) for places in found[0])
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_images_are_cropped_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of([*map(png, photographs(20)), b"", b"<html>"])
    split = image_split(DatasetDict({"train": table}), "train", dataset_name="photographs")
    made, together = [], []

    class Counting(TwoViews):
        def crop(self, images: Any, *of: Any) -> Any:
            together.append(len(images))
            return super().crop(images, *of)

    views = Counting(image_size=24, preset="paper", seed=1)
    for part_bytes in (2**26, 3 * 40 * 48 * 3, 1):
        monkeypatch.setattr("vicreg_hf.data.crops.PART_BYTES", part_bytes)
        made.append(StepCrops(split, GlobalBatches(22, 22, seed=2), views, None)(0))
    assert together == [22, *[3] * 7, 1, *[1] * 22]
    for crops in made[1:]:
        assert all(map(torch.equal, crops.views, made[0].views))
        assert crops.bad == made[0].bad
        assert {image.row for image in crops.bad} == {20, 21}


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
    square = image[:, :32, :32]
    assert torch.equal(centre_crop(square, 32, 1.0), square)  # it is not resampled


def test_evaluation_batches_keep_the_order_of_the_rows(images: Tensor, split: ImageSplit) -> None:
    rows = np.array([5, 0, 19, 3, 3])
    expected = torch.stack([centre_crop(images[row], 24, 0.875) for row in rows])
    for source, num_workers in ((images, 0), (split, 0), (split, 2)):
        made = list(evaluation_batches(source, rows, 24, batch_size=2, num_workers=num_workers))
        assert [len(batch) for batch in made] == [2, 2, 1]
        assert torch.equal(torch.cat(made), expected)
