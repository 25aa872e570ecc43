"""Whole runs on data as people have them: bad images, no labels, other channels, small memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features
from PIL import Image
from transformers import AutoModel
from workflow import train

from vicreg_hf import TwoViews
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import image_split

pytestmark = pytest.mark.usefixtures("one_core")
FEW = ["--max_steps=4", "--image_size=32"]  # an epoch
IN_MEMORY, DECODED = (32, 32), (60, 40)


def folder_of(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    """64 images of noise, without labels."""
    random = np.random.default_rng(0)
    path.mkdir()
    for row in range(64):
        shape = (size[1], size[0], len(Image.new(mode, (1, 1)).getbands()))
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.frombytes(mode, size, pixels.tobytes()).save(path / f"{row:03d}.png")
    return path


@pytest.mark.parametrize("size", [IN_MEMORY, DECODED], ids=["in memory", "decoded"])
def test_bad_images_are_replaced_counted_and_listed_up_to_the_share_given(
    size: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = folder_of(tmp_path / "data", size), tmp_path / "run"
    (data / "007.png").write_bytes(b"")
    (data / "021.png").write_text("<html>404</html>")
    (data / "050.png").write_bytes((data / "050.png").read_bytes()[:300])
    rows = train(data, run, *FEW)
    assert rows[-1]["bad_images"] == 3
    found = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    listed = {(entry["row"], Path(entry["path"]).name) for entry in found}
    assert listed == {(7, "007.png"), (21, "021.png"), (50, "050.png")}
    assert "3 images could not be used and were replaced" in capsys.readouterr().out
    again = train(data, tmp_path / "again", *FEW, "--num_workers=1")
    assert again[0] == rows[0]  # measured on the same sample
    assert [row.get("loss") for row in again] == [row.get("loss") for row in rows]
    (data / "008.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"max_bad_fraction=0.05 .* of 64; .*raise --max"):
        train(data, run, *FEW, "--resume=never")


def test_data_without_labels_are_monitored_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_, row = train(folder_of(tmp_path / "data", IN_MEMORY), tmp_path / "run", *FEW)
    assert first["step"] == 0
    for each in (first, row):
        assert 1 <= each["sample_effective_rank"] <= 64
        assert each["sample_uniformity"] < 0 < each["sample_alignment"]
    assert row["embedding_std"] > 0
    assert 1 <= row["effective_rank"] <= 16
    assert "knn" not in row
    printed = capsys.readouterr().out
    assert "kNN needs labels, but data (train) has no labels; if it has" in printed
    assert "No images with classes, so no kNN accuracy was measured" in printed
    assert "effective rank of representations: " in printed
    assert "effective rank of a batch's embeddings: " in printed


def test_an_encoder_of_gray_images_is_trained_and_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path / "data", IN_MEMORY, "L")
    train(data, tmp_path / "run", *FEW, '--model_args={"in_chans": 1}')
    assert "seen without saturation, hue, grayscale" in capsys.readouterr().out
    model: Any = AutoModel.from_pretrained(tmp_path / "run" / "encoder")
    assert len(model(torch.zeros(2, 1, 32, 32)).pooler_output) == 2


def test_images_of_many_bands_are_trained_on(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 65536, (32, 6, 40, 44), dtype=np.uint16)
    features = Features({"bands": Array3D((6, 40, 44), "uint16")})
    (tmp_path / "data").mkdir()
    table = Dataset.from_dict({"bands": list(bands)}, features=features)
    table.to_parquet(tmp_path / "data" / "train.parquet")
    rows = train(tmp_path / "data", tmp_path / "run", *FEW, '--model_args={"in_chans": 6}')
    assert np.isfinite(rows[-1]["loss"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_of_a_step_stays_in_memory(in_memory: bool, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", IN_MEMORY)
    (data / "007.png").write_bytes(b"")
    split = image_split(open_dataset(str(data)), "train", dataset_name="data")
    images = load_in_memory(split) if in_memory else split
    assert images is not None
    made = training_views(
        images, GlobalBatches(64, 2, seed=0), TwoViews(16, "tiny"), steps=range(150),
        device=torch.device("cpu"), num_workers=0,
    )  # fmt: skip
    objects = []
    for step, _ in enumerate(made):
        if step in (50, 149):
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert objects[1] < objects[0] + 90  # not one of them in each step
