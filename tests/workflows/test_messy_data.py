"""Whole runs on data as people have them: bad images, no labels, other channels, small memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Array3D, Dataset, Features
from PIL import Image
from warm import run_pretraining
from workflow import SMALL, environment, metrics

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.pretrain import pretrain


def folder_of(path: Path, count: int, size: tuple[int, int], mode: str = "RGB") -> Path:
    """Images of noise, without labels."""
    random = np.random.default_rng(0)
    path.mkdir()
    for row in range(count):
        shape = (size[1], size[0], len(Image.new(mode, (1, 1)).getbands()))
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.frombytes(mode, size, pixels.tobytes()).save(path / f"{row:03d}.png")
    return path


def train(data: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    pretrain(
        parse_arguments(
            [*SMALL, f"--dataset_name={data}", f"--output_dir={output}", "--max_steps=4", *flags]
        )
    )
    return metrics(output)


@pytest.mark.parametrize("size", [(32, 32), (60, 40)], ids=["in memory", "decoded"])
def test_bad_images_are_replaced_counted_and_listed(
    size: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path / "data", 64, size)
    (data / "007.png").write_bytes(b"")
    (data / "021.png").write_text("<html>404</html>")
    (data / "050.png").write_bytes((data / "050.png").read_bytes()[:300])
    rows = train(data, tmp_path / "run", "--image_size=32")
    assert rows[-1]["bad_images"] == 3
    found = [json.loads(li) for li in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert {entry["row"] for entry in found} == {7, 21, 50}
    assert {Path(entry["path"]).name for entry in found} == {"007.png", "021.png", "050.png"}
    printed = capsys.readouterr().out
    assert "3 images could not be used and were replaced" in printed
    again = train(data, tmp_path / "again", "--image_size=32", "--num_workers=2")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.parametrize("size", [(32, 32), (60, 40)], ids=["in memory", "decoded"])
def test_a_run_stops_above_the_share_it_was_given(size: tuple[int, int], tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", 64, size)
    for row in range(8, 14):
        (data / f"{row:03d}.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"max_bad_fraction=0.05 .* of 64; .*raise --max"):
        train(data, tmp_path / "run", "--image_size=32")
    rows = train(data, tmp_path / "tolerant", "--image_size=32", "--max_bad_fraction=0.1")
    assert rows[-1]["bad_images"] == 6


def test_a_new_run_forgets_the_list_of_an_earlier_one(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", 64, (60, 40))
    (data / "007.png").write_bytes(b"")
    train(data, tmp_path / "run", "--image_size=32")
    Image.new("RGB", (60, 40)).save(data / "007.png")
    rows = train(data, tmp_path / "run", "--image_size=32", "--resume=never")
    assert rows[-1]["bad_images"] == 0
    assert not (tmp_path / "run" / "bad_images.jsonl").exists()


def test_processes_count_bad_images_together(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", 64, (60, 40))
    for row in (3, 30):
        (data / f"{row:03d}.png").write_bytes(b"")
    result = run_pretraining(
        *SMALL, f"--dataset_name={data}", f"--output_dir={tmp_path / 'run'}", "--max_steps=4",
        "--image_size=32", processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "run")[-1]["bad_images"] == 2
    assert len((tmp_path / "run/bad_images.jsonl").read_text().splitlines()) == 2


def test_data_without_labels_are_monitored_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(folder_of(tmp_path / "data", 32, (32, 32)), tmp_path / "run")
    for row in rows:
        assert row["embedding_std"] > 0
        assert 1 <= row["effective_rank"] <= 16
        assert 0 < row["alignment"] < 4
        assert row["uniformity"] < 0
        assert "knn" not in row
    printed = capsys.readouterr().out
    assert "No labelled held-out split, so no kNN accuracy was measured" in printed
    assert "effective rank" in printed


MODES = [("L", 1), ("RGB", 1), ("RGBA", 4)]
SIZES = {"in memory": (32, 32), "decoded": (60, 40)}
STOCK = """
import json, sys
sys.modules["vicreg_hf"] = None  # importing it fails
import torch, transformers
for directory, channels in json.loads(sys.argv[1]):
    model = transformers.AutoModel.from_pretrained(directory)
    print(tuple(model(torch.zeros(2, channels, 32, 32)).pooler_output.shape))
"""


@pytest.fixture(scope="module")
def of_other_channels(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[str, str]]:
    """By mode, channels and size: what a training printed, and what its encoder gives."""
    root, printed = tmp_path_factory.mktemp("channels"), {}
    for mode, channels in MODES:
        for where, size in SIZES.items():
            place = root / f"{mode} {channels} {where}"
            place.mkdir()
            data = folder_of(place / "data", 32, size, mode)
            model_args = json.dumps({"in_chans": channels})
            with redirect_stdout(io.StringIO()) as said:
                train(data, place / "run", f"--model_args={model_args}", "--image_size=32")
            printed[place / "run/encoder", channels] = said.getvalue()
    given = json.dumps([(str(directory), channels) for directory, channels in printed])
    result = subprocess.run(
        [sys.executable, "-c", STOCK, given], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    shapes = result.stdout.splitlines()
    names = [(*mode, where) for mode in MODES for where in SIZES]
    return dict(zip(names, zip(printed.values(), shapes, strict=True), strict=True))


@pytest.mark.parametrize(("mode", "channels"), MODES)
@pytest.mark.parametrize("where", SIZES)
def test_encoders_of_other_channels_are_trained_and_published(
    of_other_channels: dict[Any, tuple[str, str]], mode: str, channels: int, where: str
) -> None:
    printed, shape = of_other_channels[mode, channels, where]
    assert "seen without saturation, hue, grayscale" in printed
    assert shape.startswith("(2, ")


def test_images_of_many_bands_are_trained_on(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 65536, (32, 6, 40, 44), dtype=np.uint16)
    features = Features({"bands": Array3D((6, 40, 44), "uint16")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"bands": list(bands)}, features=features).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    model_args = json.dumps({"in_chans": 6})
    rows = train(tmp_path / "data", tmp_path / "run", f"--model_args={model_args}")
    assert np.isfinite(rows[-1]["loss"])


LOOP = """
import resource, sys, io
import numpy as np, torch
from datasets import Dataset, DatasetDict, Features, Image as ImageFeature
from PIL import Image
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import image_split
from vicreg_hf import TwoViews

torch.set_num_threads(1)
cells = []
for row in range(64):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(row).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    cells.append({"bytes": buffer.getvalue() if row % 9 else b"", "path": None})
table = Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()}))
split = image_split(DatasetDict({"train": table}), "train", dataset_name="loop")
images = load_in_memory(split) if sys.argv[1] == "memory" else split

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

# of files the colours are those of images in memory, and cost most of the time
recipe = "tiny" if sys.argv[1] == "memory" else {"preset": "tiny", "jitter": 0}
batches, views = GlobalBatches(64, 2, seed=0), TwoViews(16, recipe)
made = training_views(
    images, batches, views, steps=range(10_000), device=torch.device("cpu"),
    num_workers=int(sys.argv[2]),
)
for step, (x, _) in enumerate(made):
    if step == 1000:
        early = resident()
print(early, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is resident")
@pytest.mark.parametrize(("where", "num_workers"), [("memory", 0), ("files", 1)])
def test_memory_is_flat_over_10000_steps(where: str, num_workers: int) -> None:
    command = [sys.executable, "-c", LOOP, where, str(num_workers)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    early, late = map(float, result.stdout.split())
    assert late < early + 16, (early, late)  # MiB; a leak of one view a step would be 28
