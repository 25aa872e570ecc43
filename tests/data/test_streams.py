"""Data that are read as they come: what each process and worker gets."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Image as ImageFeature
from hostile import write_tar
from pictures import PNG, photographs, png, table_of
from torch import Tensor
from warm import run_pretraining
from workflow import SMALL, metrics

from vicreg_hf.data import workers
from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.crops import StreamCrops
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.streams import ImageStream, image_stream
from vicreg_hf.data.workers import made_ahead
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.pretrain import pretrain
from vicreg_hf.views.presets import multi_crop_recipes
from vicreg_hf.views.random_views import RandomViews
from vicreg_hf.views.two_views import TwoViews

COUNT = 24


def files_of(count: int) -> dict[str, bytes]:
    return {f"{k:06d}.png": png(image) for k, image in enumerate(photographs(count, 40, 40))}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of six images of 40 x 40 pixels, whose keys are 0 to 23; two cannot be used."""
    folder = tmp_path_factory.mktemp("tars")
    files = files_of(COUNT)
    files["000005.png"], files["000017.png"] = b"", files["000017.png"][:200]
    for number in range(4):
        part = dict(list(files.items())[6 * number : 6 * number + 6])
        write_tar(folder / f"train-{number:03d}.tar", part)
    return folder


def share_of(folder: Path, rank: int = 0, world_size: int = 1) -> ImageStream:
    splits = open_dataset(str(folder), streaming=True)
    return image_stream(splits, "train", dataset_name="tars").share(rank, world_size, seed=0)


class OwnPixels(TwoViews):
    """Crops that are the image's own pixels, so that it can be told."""

    def crop(self, images: Any, indices: Any, epoch: Any = 0) -> Any:  # noqa: ARG002
        crops = torch.stack([image[:, :24, :24] for image in images])
        return crops, crops.clone()

    def transform_crops(self, crops: Any, indices: Any, epoch: Any = 0) -> Any:  # noqa: ARG002
        return crops[0].float(), crops[1].float()


def views_of(
    stream: ImageStream, size: int, steps: int, views: Any = None, **settings: Any
) -> list[tuple[Tensor, ...]]:
    batches = GlobalBatches(max(size, COUNT), size, seed=0)
    made = training_views(
        stream, batches, views or OwnPixels(image_size=24), steps=range(steps),
        device=torch.device("cpu"), **settings,
    )  # fmt: skip
    return list(made)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_read_every_image_once_a_pass_and_each_pass_in_its_own_order(
    tars: Path, world_size: int
) -> None:
    shares = [share_of(tars, rank, world_size) for rank in range(world_size)]
    first, again, second = (
        [str(each.path) for share in shares for each in share.read(epoch)] for epoch in (0, 0, 1)
    )
    assert sorted(first) == sorted(second) == [f"{row:06d}.png" for row in range(COUNT)]
    assert first == again != second


@pytest.mark.filterwarnings("ignore:This DataLoader will create 5 worker processes")
@pytest.mark.parametrize(("num_workers", "world_size"), [(0, 1), (5, 1), (2, 2)])
def test_workers_of_processes_give_every_usable_image_once_a_pass(
    tars: Path, num_workers: int, world_size: int
) -> None:
    seen, bad = [], BadImages(None, 1.0, None)
    # of two processes either may have both bad images
    count = (COUNT - 2) // 2 if world_size == 1 else 5
    for rank in range(world_size):
        share = share_of(tars, rank, world_size)
        made = views_of(share, 2, count, num_workers=num_workers, bad=bad)
        seen += [row for x, _ in made for row in x]
    originals = photographs(COUNT, 40, 40)[:, :, :24, :24].float()
    rows = [int((originals - image).abs().flatten(1).amax(1).argmin()) for image in seen]
    assert len(set(rows)) == len(rows)
    assert not {5, 17} & set(rows)
    bad.agree(say=lambda _: None)
    paths = {image.path for image in bad.found}
    assert paths <= {"000005.png", "000017.png"}
    assert world_size == 2 or (len(rows), len(paths)) == (COUNT - 2, 2)


def test_views_of_a_stream_depend_on_the_image_and_the_pass_alone(tars: Path) -> None:
    found = []
    for num_workers in (0, 2):
        views = TwoViews(image_size=24, places=True)
        made = views_of(share_of(tars), 2, 11, views, num_workers=num_workers)
        samples = [each for batch in made for each in zip(*batch, strict=True)]
        found.append({b"".join(own.numpy().tobytes() for own in each) for each in samples})
    assert found[0] == found[1]


def test_views_of_a_stream_may_have_sides_of_their_own(tars: Path) -> None:
    recipes = multi_crop_recipes("cifar", num_local_views=1)
    many, two = (
        views_of(share_of(tars), 8, 3, RandomViews(sides, recipes[: len(sides)]))
        for sides in ([24, 24, 12], [24, 24])
    )
    for batch, pair in zip(many, two, strict=True):
        assert [view.shape for view in batch] == [(8, 3, 24, 24)] * 2 + [(8, 3, 12, 12)]
        assert all(map(torch.equal, batch[:2], pair))


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_batch_is_the_next_images_whatever_the_chunks_they_came_in(
    tars: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = torch.cat([x for x, _ in views_of(share_of(tars), 2, 32)])
    monkeypatch.setattr("vicreg_hf.data.crops.STREAM_CHUNK", chunk)
    made = [x for x, _ in views_of(share_of(tars), 7, 9)]  # 63 images: nearly three passes
    assert [len(batch) for batch in made] == [7] * 9
    assert torch.equal(torch.cat(made), one_by_one[:63])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_start_once_in_the_main_thread_though_another_reads_the_passes(
    tars: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only there is torch told what a worker died of; as on a GPU, a thread takes the batches."""
    expected = views_of(share_of(tars), 4, 13, num_workers=num_workers)  # more than two passes
    start, starters, readers = workers._start_workers, [], set()

    def started(loader: Any) -> Any:
        starters.append(threading.current_thread())
        return start(loader)

    def in_a_thread(made: Any, _: Any) -> Any:
        return made_ahead(lambda: readers.add(threading.current_thread()) or next(made, None))

    monkeypatch.setattr(workers, "_start_workers", started)
    monkeypatch.setattr("vicreg_hf.data.batches.prefetch", in_a_thread)
    found = views_of(share_of(tars), 4, 13, num_workers=num_workers)
    assert starters == [threading.main_thread()] * num_workers
    assert not readers & {threading.main_thread()}
    assert len(found) == 13
    for batch, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, batch, other))


# --- faults


def test_bad_images_count_as_often_as_they_are_read(tmp_path: Path) -> None:
    """Also those of one name in several shards, and those without a name or content."""
    for number in range(2):
        write_tar(tmp_path / f"train-{number}.tar", files_of(4) | {"9.png": b"<html>"})
    nameless = table_of([PNG, None] * 4).to_iterable_dataset()
    for stream in (share_of(tmp_path), image_stream({"a": nameless}, "a", dataset_name="nulls")):
        bad = BadImages(None, 1.0, None)
        views_of(stream, 4, 3, bad=bad)  # a pass and a half, or three
        bad.agree(say=lambda _: None)
        assert len(bad) == (4 if stream.name.startswith("tars") else 12)


def test_bad_images_after_the_last_good_one_count_too() -> None:
    cells: list[bytes | None] = [*[PNG] * 32, *[b""] * 50]
    table = table_of(cells).to_iterable_dataset()
    stream = image_stream({"a": table}, "a", dataset_name="tail")
    chunks = list(StreamCrops(stream, TwoViews(image_size=24), False, 0))
    assert sum(isinstance(sample, BadImage) for chunk in chunks for sample in chunk) == 50


# --- tars


def names(table: Any, column: str) -> list[str]:
    return [row[column]["path"] for row in table.cast_column(column, ImageFeature(decode=False))]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("shards", "columns"), [
    ([["0.jpg", "1.jpg"], ["2.png", "3.PNG"]], ["jpg"]),
    ([["a/0.jpg", "a/1.jpg", "a/1.webp", "a/2.jpg", "b/3.webp"]], ["jpg"]),  # one odd sample
    ([["p.2024.01.jpg", "p.2024.01.cls", "p.2024.02.jpg", "q.2024.01.jpg"]], ["jpg", "cls"]),
    ([[f"{k}.{field}" for k in range(7) for field in ("jpg", "json")]], ["jpg", "json"]),
    ([[f"{k}.{field}" for k in range(3) for field in ("x.jpg", "y.png")]], ["x.jpg", "y.png"]),
    ([["0.jpg", "0.png", "1.jpg", "1.png"], ["2.webp", "2.png"]], ["jpg", "png"]),
    ([[f"{year}.{k}.jpg" for year in range(5) for k in range(4)]], ["jpg"]),
    ([[f"{k}.jpg" for k in range(7)], ["7.jpg", "7.cls"]], ["jpg", "cls"]),  # late
    ([["0.jpg", "README.txt", "1.jpg"]], ["jpg", "txt"]),
])  # fmt: skip
def test_images_of_tars_are_one_column_unless_they_stand_beside_each_other(
    shards: list[list[str]], columns: list[str], streaming: bool, tmp_path: Path
) -> None:
    others = {"cls": b"3", "json": b'{"a": 1}', "txt": b"words"}
    for number, files in enumerate(shards):
        contents = {name: others.get(name.rsplit(".", 1)[-1], PNG) for name in files}
        contents |= {
            name: b"[1]" for name in files[-1:] if name.endswith("json")
        }  # of another type
        write_tar(tmp_path / f"{number}.tar", contents)
    for _ in range(2):  # the second time from the cache
        table = open_dataset(str(tmp_path), streaming=streaming)["train"]
        assert list(table.features) == [*columns, "__key__", "__url__"]
        found = [p for column in columns if column not in others for p in names(table, column)]
        images = [n for files in shards for n in files if not n.endswith(tuple(others))]
        assert sorted(found) == sorted(images)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("streaming", [True, False])
def test_what_is_not_read_of_tars_is_said_at_every_start(
    streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "0.tar", {"./elm/0.jpg": PNG, "oak/0.jpg": PNG, "./notes.txt": b""})
    for _ in range(2):
        open_dataset(str(tmp_path), streaming=streaming)
        said = capsys.readouterr().err
        assert "1 files in tars, or groups of one name, are left out" in said
        assert "the 2 folders in tars, as oak, are not read as classes; to have labels" in said


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("streaming", [True, False])
def test_values_of_tars_are_kept_or_told_of(
    streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [b'{"a": 1, "b": null}'] * 7
    found += [b'{"a": "x", "b": "y"}', b"[1]", b'{"b": "z"}', b'{"a": 2, "c": 2}']
    write_tar(tmp_path / "0.tar", {f"{k}.jpg": PNG for k in range(6)})  # without the field
    pairs = [{f"{k}.jpg": PNG, f"{k}.json": text} for k, text in enumerate(found)]
    write_tar(tmp_path / "1.tar", {name: each for pair in pairs for name, each in pair.items()})
    for _ in range(2):
        cells = [row["json"] for row in open_dataset(str(tmp_path), streaming=streaming)["train"]]
        rest = [{"a": None, "b": "y"}, None, {"a": None, "b": "z"}, {"a": 2, "b": None}]
        assert cells == [None] * 6 + [{"a": 1, "b": None}] * 7 + rest
        said = capsys.readouterr().err
        assert f"{'some' if streaming else 3} values in tars are not read" in said
        assert f"json.a of the sample 7 in {tmp_path / '1.tar'} is the first; give each" in said
    write_tar(tmp_path / "1.tar", {"0.jpg": PNG, "0.cls": b"cat"})
    with pytest.raises(
        ValueError, match=r"got '[^:]*: [^;]* 0.cls in .*1.tar does not: invalid li"
    ):
        list(open_dataset(str(tmp_path), streaming=streaming)["train"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_cut_off_is_one_sentence(num_workers: int, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train-0.tar.gz", files_of(20), "w:gz")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"^tars \(train\) cannot be read after \d+ images of a"):
        views_of(share_of(tmp_path), 2, 9, num_workers=num_workers)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_is_read_whatever_its_name_and_named_where_it_is_cut_off(
    streaming: bool, tmp_path: Path
) -> None:
    shard = write_tar(tmp_path / "train-0.tar", files_of(3), "w:gz")
    assert len(list(open_dataset(str(tmp_path), streaming=streaming)["train"])) == 3
    shard = write_tar(tmp_path / "train-1.tar", files_of(3))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"whole, and .*train-1.tar is not: unexpected end"):
        open_dataset(str(tmp_path), streaming=streaming)


def test_a_stream_without_a_usable_image_ends_with_a_sentence() -> None:
    table = table_of([b"", b"<html>"]).to_iterable_dataset()
    stream = image_stream({"train": table}, "train", dataset_name="empty")
    with pytest.raises(ValueError, match=r"empty \(train\) must hold images that can be used"):
        views_of(stream, 2, 1)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_is_trained_on(tars: Path, tmp_path: Path, processes: int) -> None:
    flags = [
        *SMALL, f"--dataset_name={tars}", "--streaming=true", "--image_size=32",
        "--num_workers=2", "--max_bad_fraction=0.2", f"--output_dir={tmp_path}",
    ]  # fmt: skip
    if processes == 1:
        with pytest.raises(ValueError, match="max_steps must be given for streams of unknown len"):
            pretrain(parse_arguments(flags))
        pretrain(parse_arguments([*flags, "--max_steps=6"]))
    else:
        result = run_pretraining(*flags, "--max_steps=6", processes=processes)
        assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(7))
    found = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    assert rows[-1]["bad_images"] == len(found) >= 8  # two in each of four passes
    assert "knn" not in rows[-1]
