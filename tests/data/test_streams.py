"""Data that are read as they come: what each process and worker gets, and whole trainings."""

from __future__ import annotations

import io
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import photographs, png, table_of
from torch.utils._python_dispatch import TorchDispatchMode
from warm import run_pretraining
from workflow import SMALL, metrics

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.streams import ImageStream, image_stream
from vicreg_hf.views.presets import multi_crop_recipes
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews

CPU = torch.device("cpu")
COUNT = 24


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six images of 40 x 40 pixels, whose keys are 0 to 23; two cannot be used."""
    folder = tmp_path_factory.mktemp("tars")
    encoded = [png(image) for image in photographs(COUNT, 40, 40)]
    encoded[5], encoded[17] = b"", encoded[17][:200]
    for number in range(4):
        with tarfile.open(folder / f"train-{number:03d}.tar", "w") as tar:
            for row in range(6 * number, 6 * number + 6):
                member = tarfile.TarInfo(f"{row:06d}.png")
                member.size = len(encoded[row])
                tar.addfile(member, io.BytesIO(encoded[row]))
    return folder


def stream_of(tars: Path) -> ImageStream:
    splits = open_dataset(str(tars), streaming=True)
    return image_stream(splits, "train", dataset_name="tars")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_read_every_image_once(tars: Path, world_size: int) -> None:
    shares = [stream_of(tars).share(rank, world_size, seed=0) for rank in range(world_size)]
    paths = [cell["path"] for share in shares for cell in share.cells(0)]
    assert sorted(paths) == [f"{row:06d}.png" for row in range(COUNT)]


class Seen(TwoViews):
    """Crops that are the image's own pixels, so that it can be told."""

    def crop(self, images: Any, indices: Any, epoch: Any = 0) -> Any:  # noqa: ARG002
        crops = torch.stack([image[:, :24, :24] for image in images])
        return crops, crops.clone()

    def transform_crops(self, crops: Any, indices: Any, epoch: Any = 0) -> Any:  # noqa: ARG002
        return crops[0].float(), crops[1].float()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
@pytest.mark.parametrize("num_workers", [0, 1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_of_processes_give_every_usable_image_once_a_pass(
    tars: Path, num_workers: int, world_size: int
) -> None:
    seen, bad = [], BadImages(None, 1.0, None)
    for rank in range(world_size):
        stream = stream_of(tars).share(rank, world_size, seed=0)
        # of two processes either may have both bad images
        batches = GlobalBatches(COUNT, world_size * 2, seed=0, rank=rank, world_size=world_size)
        count = (COUNT - 2) // 2 if world_size == 1 else 5
        views = training_views(
            stream, batches, Seen(image_size=24), steps=range(count), device=CPU,
            num_workers=num_workers, bad=bad,
        )  # fmt: skip
        seen += [row for x, _ in views for row in x]
    originals = photographs(COUNT, 40, 40)[:, :, :24, :24].float()
    rows = [int((originals - image).abs().flatten(1).amax(1).argmin()) for image in seen]
    assert len(set(rows)) == len(rows)
    assert not {5, 17} & set(rows)
    bad.agree(say=lambda _: None)
    assert {image.path for image in bad.found} <= {"000005.png", "000017.png"}
    if world_size == 1:
        assert len(rows) == COUNT - 2
        assert len(bad) == 2


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def views_of_a_pass(folder: Path, num_workers: int, bad: BadImages | None = None) -> None:
    stream = stream_of(folder).share(0, 1, seed=0)
    batches = GlobalBatches(4, 2, seed=0)
    list(training_views(stream, batches, TwoViews(image_size=24), steps=range(2), device=CPU,
                        num_workers=num_workers, bad=bad))  # fmt: skip


def test_bad_images_of_one_name_in_several_shards_are_several(tmp_path: Path) -> None:
    good = {f"{row}.png": png(image) for row, image in enumerate(photographs(4, 40, 40))}
    for number, content in enumerate((b"<html>", b"<body>")):
        write_tar(tmp_path / f"train-{number}.tar", good | {"9.png": content})
    bad = BadImages(None, 1.0, None)
    stream = stream_of(tmp_path).share(0, 1, seed=0)
    batches = GlobalBatches(10, 8, seed=0)
    list(training_views(stream, batches, TwoViews(image_size=24), steps=range(2), device=CPU,
                        bad=bad))  # fmt: skip
    bad.agree(say=lambda _: None)
    assert [image.path for image in bad.found] == ["9.png"] * 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_cut_off_is_one_sentence(num_workers: int, tmp_path: Path) -> None:
    rows = {f"{row}.png": png(image) for row, image in enumerate(photographs(20, 40, 40))}
    shard = write_tar(tmp_path / "train-0.tar.gz", rows, "w:gz")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"^tars \(train\) cannot be read after \d+ images of a"):
        views_of_a_pass(tmp_path, num_workers)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_is_cut_off_is_named_before_anything_is_read(
    streaming: bool, tmp_path: Path
) -> None:
    rows = {f"{row}.png": png(image) for row, image in enumerate(photographs(20, 40, 40))}
    write_tar(tmp_path / "train-0.tar", rows)
    shard = write_tar(tmp_path / "train-1.tar", rows)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"whole, and .*train-1.tar is not: unexpected end"):
        open_dataset(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_is_compressed_in_spite_of_its_name_is_read(
    streaming: bool, tmp_path: Path
) -> None:
    rows = {f"{row}.png": png(image) for row, image in enumerate(photographs(3, 40, 40))}
    write_tar(tmp_path / "train-0.tar", rows, "w:gz")
    assert len(list(open_dataset(str(tmp_path), streaming=streaming)["train"])) == 3


def test_views_of_a_stream_depend_on_the_image_and_the_pass_alone(tars: Path) -> None:
    def views_of(num_workers: int) -> dict[bytes, torch.Tensor]:
        batches = GlobalBatches(COUNT, 2, seed=0)
        views = training_views(
            stream_of(tars).share(0, 1, seed=0), batches, TwoViews(image_size=24),
            steps=range(11), device=CPU, num_workers=num_workers,
        )  # fmt: skip
        pairs = [torch.stack([x, y]) for batch in views for x, y in zip(*batch, strict=True)]
        return {pair.numpy().tobytes(): pair for pair in pairs}

    assert views_of(0).keys() == views_of(2).keys()


def test_views_of_a_stream_may_have_sides_of_their_own(tars: Path) -> None:
    stream = stream_of(tars).share(0, 1, seed=0)
    recipes = multi_crop_recipes("cifar", num_local_views=1)

    def views_of(sides: list[int]) -> list[tuple[torch.Tensor, ...]]:
        made = RandomViews[tuple[torch.Tensor, ...]](sides, recipes[: len(sides)])
        batches = GlobalBatches(COUNT, 8, seed=0)
        return list(training_views(stream, batches, made, steps=range(3), device=CPU))

    many, two = views_of([24, 24, 12]), views_of([24, 24])
    for batch, pair in zip(many, two, strict=True):
        assert [view.shape for view in batch] == [(8, 3, 24, 24)] * 2 + [(8, 3, 12, 12)]
        assert all(torch.equal(*both) for both in zip(batch[:2], pair, strict=True))


def seen_of(tars: Path, batch_size: int, num_steps: int) -> list[torch.Tensor]:
    batches = GlobalBatches(COUNT, batch_size, seed=0)
    views = training_views(
        stream_of(tars).share(0, 1, seed=0), batches, Seen(image_size=24), steps=range(num_steps),
        device=CPU,
    )  # fmt: skip
    return [x for x, _ in views]


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
def test_a_batch_is_the_next_images_whatever_the_chunks_they_came_in(
    tars: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vicreg_hf.data.crops.STREAM_CHUNK", chunk)
    given = seen_of(tars, 7, 9)  # 63 images: nearly three passes
    assert [len(batch) for batch in given] == [7] * 9
    one_by_one = seen_of(tars, 2, 32)
    assert torch.equal(torch.cat(given), torch.cat(one_by_one)[:63])


class Copied(TorchDispatchMode):
    """Counts the elements that are copied from tensor to tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.cat.default, torch.ops.aten.copy_.default):
            self.count += made.numel()
        return made


def test_the_work_of_a_batch_does_not_grow_with_its_number_of_chunks(
    tars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    for chunk in (1, 22):
        monkeypatch.setattr("vicreg_hf.data.crops.STREAM_CHUNK", chunk)
        with Copied() as counter:
            seen_of(tars, 22, 1)
        copied.append(counter.count)
    assert copied[0] == copied[1]


def test_every_pass_has_an_order_of_its_own(tars: Path) -> None:
    stream = stream_of(tars).share(0, 1, seed=0)
    first, second = ([cell["path"] for cell in stream.cells(epoch)] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first == [cell["path"] for cell in stream.cells(0)]


def test_a_stream_without_a_usable_image_ends_with_a_sentence() -> None:
    table = table_of([b"", b"<html>"]).to_iterable_dataset()
    stream = image_stream({"train": table}, "train", dataset_name="empty")
    batches = GlobalBatches(2, 2, seed=0)
    with pytest.raises(ValueError, match=r"empty \(train\) must hold images that can be used"):
        list(training_views(stream, batches, TwoViews(24), steps=range(1), device=CPU))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_is_trained_on(tars: Path, tmp_path: Path, processes: int) -> None:
    flags = [
        *SMALL, f"--dataset_name={tars}", "--streaming=true", "--max_steps=6",
        "--image_size=32", "--num_workers=2", "--max_bad_fraction=0.2", f"--output_dir={tmp_path}",
    ]  # fmt: skip
    result = run_pretraining(*flags, processes=processes)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["bad_images"] == 2
    assert len((tmp_path / "bad_images.jsonl").read_text().splitlines()) == 2
    assert "knn" not in rows[-1]


def test_a_stream_of_unknown_length_asks_for_max_steps(tars: Path, tmp_path: Path) -> None:
    flags = [*SMALL, f"--dataset_name={tars}", "--streaming=true", f"--output_dir={tmp_path}"]
    result = run_pretraining(*flags)
    assert result.returncode != 0
    assert "max_steps must be given for streams of unknown length" in result.stderr


# --- what cannot be used


def test_too_many_bad_images_are_the_end(tmp_path: Path) -> None:
    bad = BadImages(100, 0.05, tmp_path / "bad.jsonl")
    said: list[str] = []
    for count in range(1, 6):
        bad.add([BadImage(count, None, "empty."), BadImage(count, None, "empty.")])
        bad.agree(seen=100, say=said.append)
        assert len(bad) == count
    bad.add([BadImage(6, "a/b.png", "empty.")])
    with pytest.raises(ValueError, match=r"max_bad_fraction=0.05 .* got 6 of 100; .* row 6 a/b"):
        bad.agree(seen=100, say=said.append)
    assert len(said) == 6
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("num_images", "seen", "bad", "stops"),
    [
        (50_000, 200, 50, False),  # few seen: judged as if of a thousand
        (50_000, 200, 51, True),
        (50_000, 40_000, 2000, False),
        (50_000, 40_000, 2001, True),
        (50_000, 10**9, 2501, True),  # many epochs
        (40, 16, 2, False),
        (40, 16, 3, True),
        (None, 4000, 200, False),
        (None, 4000, 201, True),
    ],
)
def test_the_share_is_of_the_images_seen(
    num_images: int | None, seen: int, bad: int, stops: bool
) -> None:
    images = BadImages(num_images, 0.05, None)
    images.add(BadImage(row, None, "empty.") for row in range(bad))
    with pytest.raises(ValueError, match=f"got {bad} of") if stops else nullcontext():
        images.agree(seen=seen, say=lambda _: None)


def test_what_is_found_while_processes_agree_is_told_the_next_time() -> None:
    bad = BadImages(100, 0.5, None)
    bad.add([BadImage(3, None, "empty.")])

    def gather(own: list[BadImage]) -> list[BadImage]:
        bad.add([BadImage(4, None, "cut.")])  # by the thread that makes the next batches
        return list(own)

    bad.agree(gather, say=lambda _: None)
    assert len(bad) == 1
    bad.agree(say=lambda _: None)
    assert len(bad) == 2


def test_a_resumed_run_knows_the_bad_images_of_before(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first = BadImages(100, 0.5, path)
    first.add([BadImage(3, None, "empty."), BadImage(4, "x.png", "cut.")])
    first.agree(say=lambda _: None)
    with path.open("a") as file:
        file.write('{"row": 5, "pa')  # torn by a kill
    again = BadImages(100, 0.5, path)
    again.recall()
    assert again.found == first.found


def test_processes_agree_on_what_all_have_found() -> None:
    other = [BadImage(7, None, "cut."), BadImage(3, None, "empty.")]
    bad = BadImages(100, 0.5, None)
    bad.add([BadImage(3, None, "empty.")])
    bad.agree(lambda own: own + other, say=lambda _: None)
    assert {image.row for image in bad.found} == {3, 7}
