"""Features of whole data sets, extracted as users do, against stock transformers."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from families import trained
from hub import READER, WRITER, running_hub
from pictures import photographs, png
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor, AutoModel
from warm import Script, run_script
from workflow import run, small_files

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.features.encode import encode
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.extract import extract_dataset
from vicreg_hf.runtime.output_dir import claim
from vicreg_hf.settings.extraction import ExtractionArguments

SIZES = [(40, 60), (64, 64), (33, 90), (120, 50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of photographs of several sizes, gray ones among them, and one HTML page."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for k in range(36):
        (image,) = photographs(1, *SIZES[k % 4])
        picture = tv.to_pil_image((image.int() + 3 * k).clamp(0, 255).byte())
        path = root / "train" / ("cat" if k % 3 else "dog") / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (picture.convert("L") if k == 7 else picture).save(path)
    (root / "train" / "dog" / "99.png").write_bytes(b"<html>404</html>")
    for kind in ("cat", "dog"):
        (root / "test" / kind).mkdir(parents=True)
        shutil.copy(root / "train" / "dog" / "00.png", root / "test" / kind / "copy.png")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    model = trained()
    assert model.config.pretrained_cfg is not None
    model.config.pretrained_cfg |= {"input_size": [3, 48, 48], "crop_pct": 0.9}
    model.save_pretrained(directory, include_expander=False)
    return directory


def command(encoder: Path, folder: Path, output: Path, *flags: str) -> list[str]:
    return [
        "scripts/extract_features.py", f"--model={encoder}", "--num_workers=1",
        f"--dataset_name={folder}", f"--output_dir={output}", "--batch_size=5",
        "--rows_per_file=10", *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def extracted(encoder: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("features") / "whole"
    done = run_script(*command(encoder, folder, output))
    assert done.returncode == 0, done.stderr
    assert "1 images could not be used and were left out" in done.stdout + done.stderr
    return output


def load(directory: Path, tmp_path: Path) -> Any:
    return datasets.load_dataset(str(directory), cache_dir=str(tmp_path / "cache"))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "data").iterdir()}


def test_features_are_those_of_stock_transformers_image_by_image(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    found = load(extracted, tmp_path)
    assert {name: len(table) for name, table in found.items()} == {"train": 36, "test": 2}
    table = found["train"]
    assert table.column_names == ["row", "image_id", "embedding", "label"]
    assert table.features["label"].names == ["cat", "dog"]
    assert table.features["embedding"].length == 96
    model: Any = AutoModel.from_pretrained(encoder)
    processor = AutoImageProcessor.from_pretrained(encoder)
    for row in table:
        assert (folder / row["image_id"]).is_file()
        assert Path(row["image_id"]).parent.name == table.features["label"].int2str(row["label"])
        picture = Image.open(folder / row["image_id"]).convert("RGB")
        with torch.no_grad():
            expected = model(**processor(picture, return_tensors="pt")).pooler_output[0]
        embedding = torch.tensor(row["embedding"])
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)


def test_features_of_one_name_are_not_taken_for_each_other(extracted: Path, tmp_path: Path) -> None:
    """`datasets` has cached those of the first directory when it is asked for the second's."""
    for number in range(2):
        directory = tmp_path / str(number) / "features"
        shutil.copytree(extracted, directory)
        (path,) = (directory / "data").glob("test-*.parquet")
        table = datasets.Dataset.from_parquet(str(path)).map(lambda _, n=number: {"row": n})
        table.to_parquet(path)
        assert set(load(directory, tmp_path)["test"]["row"]) == {number}


def test_an_image_that_cannot_be_used_is_left_out_and_listed(
    extracted: Path, tmp_path: Path
) -> None:
    rows = load(extracted, tmp_path)["train"]["row"]
    assert sorted(set(range(37)) - set(rows)) == [36]
    (line,) = (extracted / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 36


def test_a_part_of_bad_images_alone_is_empty_and_loads_with_the_others(
    encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for k, image in enumerate(photographs(8)):
        tv.to_pil_image(image).save(tmp_path / "data" / f"{k}.png")
    for k in (2, 3):
        (tmp_path / "data" / f"{k}.png").write_bytes(b"")
    words = (str(encoder), str(tmp_path / "data"), str(tmp_path / "out"))
    bounds: Any = {"rows_per_file": 2, "max_bad_fraction": 0.5, "num_workers": 0}
    extract_dataset(ExtractionArguments(*words, **bounds))
    assert load(tmp_path / "out", tmp_path)["train"]["row"][:] == [0, 1, 4, 5, 6, 7]


def test_two_processes_write_the_same(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    done = run_script(*command(encoder, folder, tmp_path / "out"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = load(extracted, tmp_path), load(tmp_path / "out", tmp_path)
    assert files(extracted).keys() == files(tmp_path / "out").keys()
    for split in ("train", "test"):
        for column in ("row", "image_id", "label"):
            assert one[split][column][:] == two[split][column][:]
        a, b = (np.array(table[split]["embedding"][:]) for table in (one, two))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_stopped_extraction_goes_on_with_what_is_missing(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(extracted, output)
    lost = output / "data" / "train-00001-of-00004.parquet"
    (output / "data" / ".train-00001-of-00004.parquet.partial").write_bytes(b"torn")
    kept = {path: path.stat().st_mtime_ns for path in (output / "data").iterdir() if path != lost}
    whole = lost.read_bytes()
    lost.unlink()
    done = run_script(*command(encoder, folder, output))
    assert done.returncode == 0, done.stderr
    assert lost.read_bytes() == whole
    for path, written in kept.items():
        if not path.name.startswith("."):
            assert path.stat().st_mtime_ns == written


def test_killed_at_any_moment_it_ends_with_the_same_features(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = command(encoder, folder, output)
    for parts in (1, 3):
        process = Script(words)
        while len(list(output.glob("data/t*.parquet"))) < parts and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert files(extracted).items() <= files(output).items()


def test_a_full_disk_costs_nothing_that_is_finished(
    encoder: Path, folder: Path, extracted: Path, tmp_path: Path
) -> None:
    words = [str(encoder), str(folder), str(tmp_path / "out")]
    args = ExtractionArguments(*words, rows_per_file=10, batch_size=5, num_workers=0)
    most = max(map(len, files(extracted).values())) - 1
    sentence = r"output_dir must be .* written, got .*too large.* kept; free some space and start"
    with small_files(most), pytest.raises(ValueError, match=sentence):
        extract_dataset(args)
    extract_dataset(args)
    assert files(tmp_path / "out") == files(extracted)


def test_a_damaged_part_is_said_and_made_again(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(extracted, output)
    names = [f"train-{number:05d}-of-00004.parquet" for number in range(4)]
    parts = [output / "data" / name for name in names]
    whole = parts[1].read_bytes()
    parts[0].write_bytes(b"")
    parts[1].write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    parts[2].write_bytes(flipped(parts[2], middle))
    # a valid file of too few rows
    pq.write_table(pq.read_table(parts[3]).slice(0, 4), parts[3])
    (kept,) = (output / "data").glob("test-*")
    written = kept.stat().st_mtime_ns
    done = run_script(*command(encoder, folder, output))
    assert done.returncode == 0, done.stderr
    for part in parts:
        assert f"warning: {part} is damaged and is made again: " in done.stdout
    assert "made again: it lacks 2 images that can be used." in done.stdout
    assert files(output) == files(extracted)
    assert kept.stat().st_mtime_ns == written
    assert (output / "bad_images.jsonl").read_text() == (extracted / "bad_images.jsonl").read_text()


def flipped(path: Path, place: int) -> bytes:
    content = bytearray(path.read_bytes())
    for k in range(place, place + 8):
        content[k] ^= 0xFF
    return bytes(content)


def test_the_share_of_bad_images_is_judged_at_every_start(encoder: Path, tmp_path: Path) -> None:
    cells = []
    for image in photographs(8):
        buffer = io.BytesIO()
        tv.to_pil_image(image).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    kinds = datasets.Features({"image": datasets.Image()})
    (tmp_path / "data").mkdir()
    for split, bad in {"train": (1, 6), "test": (1,)}.items():  # the same row, once in each
        own = [{"bytes": b"", "path": None} if k in bad else cells[k] for k in range(8)]
        table = datasets.Dataset.from_dict({"image": own}, features=kinds)
        table.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    words = (str(encoder), str(tmp_path / "data"), str(tmp_path / "out"))
    sizes: Any = {"rows_per_file": 2, "num_workers": 0}
    few = ExtractionArguments(*words, **sizes, max_bad_fraction=0.18)
    for _ in range(3):
        with pytest.raises(ImageError, match=r"max_bad_fraction=0.18 .* got 3 of 16; mend or"):
            extract_dataset(few)
    # as a kill leaves it: the list is written last
    (tmp_path / "out" / "bad_images.jsonl").unlink()
    (tmp_path / "out" / "data" / "train-00002-of-00004.parquet").unlink()
    for _ in range(2):
        extract_dataset(ExtractionArguments(*words, **sizes, max_bad_fraction=0.19))
        lines = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
        assert {json.loads(line)["row"] for line in lines} == {1, 6}


@pytest.mark.parametrize("left", ["", '{"encoder": "0c', "[1]"])
def test_a_damaged_record_is_no_hindrance_or_is_said(
    left: str, extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    record = output / "extraction.json"
    record.write_text(left)
    words = (str(encoder), str(folder), str(output))
    args = ExtractionArguments(*words, rows_per_file=10, batch_size=5, num_workers=0)
    extract_dataset(args)  # nothing contradicts
    assert record.read_bytes() == (extracted / "extraction.json").read_bytes()
    before = files(output)
    record.write_text(left)
    with pytest.raises(ValueError, match=rf"{record} must say which .* damaged \(.*; delete it if"):
        extract_dataset(args)
    record.unlink()
    extract_dataset(args)
    assert files(output) == before


def test_a_directory_in_use_is_refused(encoder: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    left = output / "data" / ".train-00000-of-00004.parquet.17.partial"
    with claim(output):
        left.parent.mkdir()
        left.write_bytes(b"of the first")
        done = run_script(*command(encoder, folder, output))
        assert done.returncode == 1
        assert done.stderr.endswith(
            f"error: output_dir must not be in use by another run, and {output} is; wait for it, "
            "stop it, or choose another output_dir.\n"
        )
        assert left.is_file()
        assert not (output / "extraction.json").exists()


def test_other_settings_are_not_mixed_into_the_same_directory(
    extracted: Path, encoder: Path, folder: Path
) -> None:
    before = files(extracted)
    done = run_script(*command(encoder, folder, extracted, "--dtype=float16", "--bf16=true"))
    assert done.returncode != 0
    assert "dtype, bf16 differ" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(extracted) == before


def test_half_precision_is_near(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    flags = ["--dtype=float16", "--bf16=true", "--split=train"]
    done = run_script(*command(encoder, folder, tmp_path / "out", *flags))
    assert done.returncode == 0, done.stderr
    half = load(tmp_path / "out", tmp_path)
    assert list(half) == ["train"]
    assert half["train"].features["embedding"].feature.dtype == "float16"
    exact = np.array(load(extracted, tmp_path)["train"]["embedding"][:])
    near = np.array(half["train"]["embedding"][:], dtype=np.float64)
    cosine = (exact * near).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(near, axis=1)
    assert cosine.min() > 0.999
    assert not np.allclose(exact, near, rtol=1e-6)


def test_features_are_pushed_as_a_data_set_in_one_commit(
    extracted: Path, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    with running_hub() as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        output = tmp_path / "out"
        shutil.copytree(extracted, output)
        flags = ["--push_to_hub=true", "--hub_dataset_id=org/feats", "--hub_private=true"]
        words = [sys.executable, *command(encoder, folder, output, *flags)]
        refused = run(words, HF_TOKEN=READER, **online)
        assert refused.returncode != 0
        assert "error: pushing to org/feats needs an access token that may write" in refused.stderr
        done = run(words, HF_TOKEN=WRITER, **online)
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["datasets/org/feats"]
        assert repository.private
        assert len(repository.commits) == 2
        pushed = repository.files()
        data = {f"data/{name}": content for name, content in files(output).items()}
        assert pushed.keys() == data.keys() | {"README.md"}
        assert data.items() <= pushed.items()
        assert str(folder) not in pushed["README.md"].decode()
        shutil.rmtree(output / "data")
        for name, content in pushed.items():  # as a download lays it out
            (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "down" / name).write_bytes(content)
        assert set(load(tmp_path / "down", tmp_path)) == {"train", "test"}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"dtype": "int8"}, "dtype must be float32 or float16"),
        ({"push_to_hub": True}, "push_to_hub needs hub_dataset_id"),
        ({"hub_dataset_id": "../x"}, "hub_dataset_id must be org/name"),
        ({"split": "absent"}, "split must be one of train, test"),
        ({"image_column": "absent"}, "image_column must name a column of images"),
    ],
)
def test_settings_that_cannot_be_are_said(
    setting: dict[str, Any], sentence: str, encoder: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        extract_dataset(ExtractionArguments(str(encoder), str(folder), str(tmp_path), **setting))


def test_rows_without_a_path_are_named_by_their_number(encoder: Path, tmp_path: Path) -> None:
    cells = []
    for image in photographs(3):
        buffer = io.BytesIO()
        tv.to_pil_image(image).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    kinds = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": cells}, features=kinds)
    (tmp_path / "data").mkdir()
    table.to_parquet(str(tmp_path / "data" / "train.parquet"))
    output = tmp_path / "out"
    data = str(tmp_path / "data")
    extract_dataset(ExtractionArguments(str(encoder), data, str(output), num_workers=0))
    found = load(output, tmp_path)["train"]
    assert found["image_id"][:] == ["0", "1", "2"]
    assert "label" not in found.column_names


CLASSES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("kind", "train", "test", "read"),
    [
        (None, ["cat", "dog", "ant", "cat"], ["dog", "cat"], ["dog", "cat"]),
        (None, ["cat", "dog", "cat", "dog"], ["eel", "dog", "cat"], ["eel", "dog", "cat"]),
        (None, [3, 7, 3, 3], [7, 9, 7], ["7", "9", "7"]),
        (CLASSES, [0, 1, 1, 0], [1, 0], ["dog", "cat"]),
        (CLASSES, [0, 1, 1, 0], [1, -1], ["dog", None]),  # of which one has no class
    ],
)
def test_labels_mean_the_same_in_every_split(
    kind: Any, train: list[Any], test: list[Any], read: list[Any], encoder: Path, tmp_path: Path
) -> None:
    shown = tv.to_pil_image(photographs(1, 40, 40)[0])
    splits = {}
    for name, labels in {"train": train, "test": test}.items():
        table = datasets.Dataset.from_dict({"image": [shown] * len(labels), "label": labels})
        splits[name] = table if kind is None else table.cast_column("label", kind)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    args = ExtractionArguments(
        model=str(encoder), dataset_name=str(tmp_path / "data"), num_workers=0,
        output_dir=str(tmp_path / "features"), label_column=None if kind else "label",
    )  # fmt: skip
    extract_dataset(args)
    found = load(tmp_path / "features", tmp_path)
    names = found["train"].features["label"].names
    record = json.loads((tmp_path / "features" / "extraction.json").read_text())
    assert record["classes"] == names  # so that parts of others are not mixed in
    of_train = [str(value) if kind is None else CLASSES.names[value] for value in train]
    assert [names[k] for k in found["train"]["label"]] == of_train
    assert [names[k] if k >= 0 else None for k in found["test"]["label"]] == read


def test_features_that_are_not_finite_are_refused() -> None:
    linear = torch.nn.Linear(12, 2)
    torch.nn.init.constant_(linear.weight, torch.inf)
    module = torch.nn.Sequential(torch.nn.Flatten(), linear)
    config = {"input_size": (3, 2, 2), "mean": (0,) * 3, "std": (1,) * 3}
    encoder = Encoder(module, 2, lambda image: image, config, {})
    images = torch.ones(4, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must give finite features, and some are not"):
        encode(encoder, images, torch.device("cpu"))


@pytest.mark.parametrize("several", [False, True])
def test_images_in_zips_are_named_as_in_a_folder(
    several: bool, encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    names = ["a.zip", "b.zip"] if several else ["a.zip"]
    for name in names:
        with zipfile.ZipFile(tmp_path / "data" / name, "w") as file:
            for row, image in enumerate(photographs(2, 40, 40)):
                file.writestr(f"{row}.png", png(image))
    args = ExtractionArguments(
        model=str(encoder), dataset_name=str(tmp_path / "data" / ("" if several else "a.zip")),
        num_workers=0, output_dir=str(tmp_path / "features"),
    )  # fmt: skip
    extract_dataset(args)
    found = load(tmp_path / "features", tmp_path)["train"]["image_id"][:]
    inside = ["0.png", "1.png"]
    assert found == ([f"{zipped}/{name}" for zipped in names for name in inside] if several
                     else inside)  # fmt: skip
