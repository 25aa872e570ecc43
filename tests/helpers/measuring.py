"""Data sets of digits, encoders to measure on them, and evaluations that take seconds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from encoders import vicreg
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModel

from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.settings.evaluation import EvaluationArguments

NAMES = [f"digit {number}" for number in range(10)]
QUICK: dict[str, Any] = {
    "knn_k": "5,20", "retrieval_k": "1,10", "num_workers": 0, "probe_epochs": 5, "epochs": 2,
}  # fmt: skip
"""Settings with which a protocol takes a second."""
MANY = ["even", "large", "round", "seven"]


def cell(pixels: NDArray[np.uint8], path: str | None = None) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def digits(rows: range) -> tuple[list[dict[str, Any]], list[int]]:
    """Some of scikit-learn's handwritten digits, of 32 x 32 pixels, and what they show."""
    bundle: Any = load_digits()
    scans = (bundle.images * 15.9).astype(np.uint8)
    return [cell(scans[row], f"{row}.png") for row in rows], bundle.target[rows].tolist()


def several(numbers: Sequence[int]) -> list[list[int]]:
    rules = (lambda d: d % 2 == 0, lambda d: d > 4, lambda d: d in (0, 6, 8, 9), lambda d: d == 7)
    return [[k for k, holds in enumerate(rules) if holds(digit)] for digit in numbers]


def write(folder: Path, labels: Any = None, **splits: tuple[Sequence[Any], Any]) -> Path:
    """A parquet data set; a split is its images and their labels."""
    kinds: dict[str, Any] = {"image": ImageFeature()}
    for name, (images, classes) in splits.items():
        own = kinds if classes is None else kinds | {"label": labels or ClassLabel(names=NAMES)}
        columns = {"image": list(images)} | ({} if classes is None else {"label": classes})
        folder.mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict(columns, features=Features(own))
        table.to_parquet(str(folder / f"{name}.parquet"))
    return folder


def write_few(folder: Path) -> Path:
    """A data set of 40 and 20 digits."""
    return write(folder, train=digits(range(40)), test=digits(range(60, 80)))


def write_encoder(directory: Path, seed: int = 0, **cfg: Any) -> Path:
    """An untrained encoder of images of 32 x 32 pixels."""
    model = vicreg()
    torch.manual_seed(seed)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.1 * seed)
    assert model.config.pretrained_cfg is not None
    model.config.pretrained_cfg |= {"input_size": [3, 32, 32], "crop_pct": 1.0} | cfg
    model.save_pretrained(directory, include_expander=False)
    return directory


def arguments(
    model: Path | str, data: Path, folder: Path, protocols: str = "knn", **given: Any
) -> EvaluationArguments:
    places: dict[str, Any] = {
        "output_dir": str(folder / "out"), "cache_dir": str(folder / "cache")
    }  # fmt: skip
    return EvaluationArguments(str(model), str(data), protocols, **(QUICK | places | given))


def measure(*words: Any, **given: Any) -> dict[str, Any]:
    """Run an evaluation: each measurement by its name."""
    results = evaluate(arguments(*words, **given), say=lambda _: None)
    return {measurement["name"]: measurement for measurement in results["results"]}


def script(*flags: str) -> list[str]:
    quick = [f"--{name}={value}" for name, value in QUICK.items()]
    return ["scripts/evaluate.py", *quick, *flags]


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def labels_of(data: Path, split: str) -> NDArray[np.int64]:
    table: Any = Dataset.from_parquet(str(data / f"{split}.parquet"))
    return np.array(table["label"][:])


def stock_features(directory: Path, data: Path, split: str) -> NDArray[np.float32]:
    """Each image's features, by transformers alone."""
    model: Any = AutoModel.from_pretrained(directory)
    processor: Any = AutoImageProcessor.from_pretrained(directory)
    table: Any = Dataset.from_parquet(str(data / f"{split}.parquet"))
    with torch.no_grad():
        views = [processor(image, return_tensors="pt")["pixel_values"] for image in table["image"]]
        return model.eval()(torch.cat(views)).pooler_output.flatten(1).numpy()
