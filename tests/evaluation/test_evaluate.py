"""Measurements against stock loaders and scikit-learn."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measuring import (
    NAMES,
    arguments,
    labels_of,
    measure,
    stock_features,
    strict,
    write_encoder,
)
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.metrics.linear_probe import linear_probe
from vicreg_hf.metrics.subsets import balanced_subset

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")

ALL = "knn,linear,linear-sgd,finetune-10,retrieval,collapse"


@pytest.fixture(scope="module")
def whole(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All protocols, on one process."""
    folder = tmp_path_factory.mktemp("whole")
    returned = evaluate(arguments(encoder, data, folder, ALL), say=lambda _: None)
    assert strict(folder / "out" / "results.json") == json.loads(json.dumps(returned))
    return folder / "out"


@pytest.fixture(scope="module")
def found(whole: Path) -> dict[str, Any]:
    return {each["name"]: each for each in strict(whole / "results.json")["results"]}


def test_results_hold_what_one_reads_them_by(whole: Path, found: dict[str, Any]) -> None:
    results = strict(whole / "results.json")
    about = {"dataset": "digits", "model": "untrained", "train_split": "train",
             "eval_split": "test", "num_train_images": 300, "num_eval_images": 120,
             "num_features": 96}  # fmt: skip
    assert about.items() <= results.items()
    assert results["preprocessing"]["input_size"] == [3, 32, 32]
    assert results["hardware"].endswith("1 process")
    assert set(results["software"]) == {"vicreg_hf", "torch", "timm", "transformers", "python"}
    assert len(found) == len(results["results"]) == 2 + 1 + 1 + 1 + 3 + 5
    assert {each["protocol"] for each in found.values()} == set(ALL.split(","))
    page = html.unescape((whole / "report.html").read_text(encoding="utf-8"))
    assert all(text in page for text in ("untrained on digits", *NAMES, *found))
    for each in found.values():
        assert (each["seed"], each["num_images"]) == (0, 120)
        if each["percent"]:
            assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
            assert each["settings"]
    assert found["20-NN top-1 accuracy"]["settings"] == {
        "k": 20, "temperature": 0.07, "similarity": "cosine"
    }  # fmt: skip
    tuned = found["fine-tuning, 10 % of the labels top-1 accuracy"]["settings"]
    assert tuned["lr_backbone"] > 0
    assert found["linear, authors' protocol top-1 accuracy"]["settings"]["lr_backbone"] == 0


def test_classifiers_and_retrieval_are_those_of_stock_features(
    found: dict[str, Any], encoder: Path, data: Path
) -> None:
    x = {split: stock_features(encoder, data, split) for split in ("train", "test")}
    labels, wanted = labels_of(data, "train"), labels_of(data, "test")
    weights: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    for k in (5, 20):
        votes: Any = KNeighborsClassifier(k, metric="cosine", weights=weights)
        expected = (votes.fit(x["train"], labels).predict(x["test"]) == wanted).mean()
        assert 0.3 < expected < 0.9
        assert found[f"{k}-NN top-1 accuracy"]["value"] == pytest.approx(expected)
    unit: Any = normalize
    nearest = np.argsort(-unit(x["test"]) @ unit(x["train"]).T, axis=1)[:, :10]
    hits = labels[nearest] == wanted[:, None]
    precision = hits.cumsum(1) / np.arange(1, 11)
    train, test = (torch.from_numpy(x[split]) for split in ("train", "test"))
    probe = linear_probe(train, torch.from_numpy(labels), test, num_classes=10, epochs=5, seed=0)
    assert found["linear probe top-1 accuracy"]["value"] == pytest.approx(
        (probe.predictions.numpy() == wanted).mean(), abs=1.01 / 120
    )
    # every class has more than ten images to find
    assert found["mean average precision at 10"]["value"] == pytest.approx(
        (precision * hits).sum(1).mean() / 10, abs=1e-6
    )
    assert found["recall at 10"]["value"] == pytest.approx(hits.any(1).mean())
    assert found["recall at 1"]["value"] == pytest.approx(hits[:, 0].mean())


def test_linear_learns_from_so_many_labels_of_each_class(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    found = measure(encoder, data, tmp_path, "linear", labels_per_class=3, seed=1)
    x = {
        split: torch.from_numpy(stock_features(encoder, data, split)) for split in ("train", "test")
    }
    labels, wanted = (torch.from_numpy(labels_of(data, split)) for split in ("train", "test"))
    rows = balanced_subset(labels, number=3, seed=1)
    assert labels[rows].bincount().tolist() == [3] * 10
    probe = linear_probe(x["train"][rows], labels[rows], x["test"], epochs=5, seed=1)
    assert found["linear probe, 3 labels a class top-1 accuracy"]["value"] == pytest.approx(
        probe.accuracy(wanted), abs=2.01 / 120
    )


def test_a_collapsed_encoder_gives_numbers_that_json_has(few: Path, tmp_path: Path) -> None:
    file = write_encoder(tmp_path / "dead") / "model.safetensors"
    weights = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    found = measure(tmp_path / "dead", few, tmp_path, "knn,linear,retrieval,collapse")
    assert found["effective rank of features"]["value"] == pytest.approx(1, abs=0.01)
    strict(tmp_path / "out" / "results.json")
