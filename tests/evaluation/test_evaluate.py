"""What is measured, against stock loaders and scikit-learn, and on any number of processes."""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from encoders import resnet, vicreg, vit
from hub import READER, Repository, running_hub
from measuring import (
    NAMES,
    arguments,
    digits,
    labels_of,
    measure,
    script,
    stock_features,
    strict,
    write,
    write_encoder,
    write_few,
)
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from torch.nn import functional as F
from warm import run_script
from workflow import run

from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.runtime.randomness import permutation

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")

ALL = "knn,linear,linear-sgd,finetune-10,retrieval,collapse"


def timm_features(directory: Path, data: Path, split: str) -> NDArray[np.float32]:
    """Of each image, by timm alone."""
    model = timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0).eval()
    view: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    table: Any = Dataset.from_parquet(str(data / f"{split}.parquet"))
    with torch.no_grad():
        return model(torch.stack([view(image) for image in table["image"]])).numpy()


def knn_accuracy(directory: Path, data: Path, k: int, features_of: Any = stock_features) -> float:
    """By scikit-learn."""

    def weights(distance: NDArray[Any]) -> NDArray[Any]:
        return np.exp((1 - distance) / 0.07)

    classifier: Any = KNeighborsClassifier
    votes = classifier(k, metric="cosine", weights=weights)
    votes.fit(features_of(directory, data, "train"), labels_of(data, "train"))
    found = votes.predict(features_of(directory, data, "test"))
    return float((found == labels_of(data, "test")).mean())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    return write(root, train=digits(range(300)), test=digits(range(300, 420)))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_few(tmp_path_factory.mktemp("few") / "few")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "untrained")


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


# What is measured


def test_results_hold_all_that_is_needed_to_read_them(whole: Path, found: dict[str, Any]) -> None:
    results = strict(whole / "results.json")
    about = {"dataset": "digits", "model": "untrained", "train_split": "train",
             "eval_split": "test", "num_train_images": 300, "num_eval_images": 120,
             "num_features": 96}  # fmt: skip
    assert about.items() <= results.items()
    assert results["preprocessing"]["input_size"] == [3, 32, 32]
    assert results["hardware"].endswith("1 process")
    assert set(results["software"]) == {"vicreg_hf", "torch", "timm", "transformers", "python"}
    assert len(found) == len(results["results"]) == 2 + 1 + 1 + 1 + 4 + 5
    assert {each["protocol"] for each in found.values()} == set(ALL.split(","))
    for each in found.values():
        assert each["seed"] == 0
        assert each["num_images"] == 120
        if each["percent"]:
            assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
            assert each["settings"]
    assert found["20-NN top-1 accuracy"]["settings"] == {
        "k": 20, "temperature": 0.07, "similarity": "cosine"
    }  # fmt: skip


def test_nearest_neighbours_are_those_of_scikit_learn_on_stock_features(
    found: dict[str, Any], encoder: Path, data: Path
) -> None:
    for k in (5, 20):
        expected = knn_accuracy(encoder, data, k)
        assert 0.3 < expected < 0.9
        assert found[f"{k}-NN top-1 accuracy"]["value"] == pytest.approx(expected)


def test_the_interval_is_as_wide_as_that_of_a_share(found: dict[str, Any]) -> None:
    accuracy = found["20-NN top-1 accuracy"]
    deviation = np.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 120)
    width = accuracy["high"] - accuracy["low"]
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_the_linear_probe_is_one_trained_with_the_setting_it_names(
    found: dict[str, Any], encoder: Path, data: Path
) -> None:
    probe = found["linear probe top-1 accuracy"]
    settings = probe["settings"]
    x, x_test = (
        torch.from_numpy(stock_features(encoder, data, split)) for split in ("train", "test")
    )
    mean, std = x.mean(0), x.std(0)
    std[std < 1e-6 * std.max()] = 1  # of features that are the same for all
    x, x_test = (x - mean) / std, (x_test - mean) / std
    labels = torch.from_numpy(labels_of(data, "train"))
    linear = torch.nn.Linear(96, 10)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    groups = [{"params": [linear.weight], "weight_decay": decay}, {"params": [linear.bias]}]
    sgd = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, settings["epochs"] * 10)
    for epoch in range(settings["epochs"]):
        for rows in torch.from_numpy(permutation(300, seed=0, epoch=epoch)).split(
            settings["batch_size"]
        ):
            sgd.zero_grad()
            F.cross_entropy(linear(x[rows]), labels[rows]).backward()
            sgd.step()
            cosine.step()
    right = (linear(x_test).argmax(1).numpy() == labels_of(data, "test")).mean()
    assert probe["value"] == pytest.approx(right, abs=1.01 / 120)
    tried = probe["details"]["tried"]
    best = min((each for each in tried if each["validation_loss"] is not None),
               key=lambda each: each["validation_loss"])  # fmt: skip
    assert len(tried) == 28
    assert (best["learning_rate"], best["weight_decay"]) == (rate, decay)


def test_retrieval_is_what_a_sort_of_similarities_gives(
    found: dict[str, Any], encoder: Path, data: Path
) -> None:
    unit: Any = normalize
    bank, queries = (unit(stock_features(encoder, data, s)) for s in ("train", "test"))
    labels, wanted = labels_of(data, "train"), labels_of(data, "test")
    hits = labels[np.argsort(-queries @ bank.T, axis=1)[:, :10]] == wanted[:, None]
    precision = hits.cumsum(1) / np.arange(1, 11)
    # every class has more than ten images to find
    assert found["mean average precision at 10"]["value"] == pytest.approx(
        (precision * hits).sum(1).mean() / 10, abs=1e-6
    )
    assert found["recall at 10"]["value"] == pytest.approx(hits.any(1).mean())
    assert found["recall at 1"]["value"] == pytest.approx(hits[:, 0].mean())


def test_fine_tuning_on_a_tenth_uses_a_tenth_of_every_class(
    found: dict[str, Any], data: Path
) -> None:
    sizes = np.bincount(labels_of(data, "train"))
    settings = found["fine-tuning, 10 % of the labels top-1 accuracy"]["settings"]
    assert settings["training_images"] == sum(max(1, round(0.1 * size)) for size in sizes)
    assert settings["lr_backbone"] > 0
    assert found["linear, authors' protocol top-1 accuracy"]["settings"]["lr_backbone"] == 0


def test_the_report_names_every_result(whole: Path, found: dict[str, Any]) -> None:
    page = html.unescape((whole / "report.html").read_text(encoding="utf-8"))
    for each in found.values():
        assert each["name"] in page
    assert "untrained on digits" in page
    assert all(name in page for name in NAMES)


def test_a_collapsed_encoder_gives_numbers_that_json_has(few: Path, tmp_path: Path) -> None:
    model = vicreg()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.config.pretrained_cfg is not None
    model.config.pretrained_cfg |= {"input_size": [3, 32, 32], "crop_pct": 1.0}
    model.save_pretrained(tmp_path / "dead", include_expander=False)
    words = (tmp_path / "dead", few, tmp_path, "knn,linear,retrieval,collapse")
    found = measure(*words)
    assert found["effective rank"]["value"] == pytest.approx(1, abs=0.01)
    strict(tmp_path / "out" / "results.json")


# Any encoder, on any number of processes


def timm_model(path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_efficientnet", num_classes=3)
    model.pretrained_cfg |= {"input_size": [3, 48, 48], "crop_pct": 0.9}
    timm.models.save_for_hf(model, str(path), safe_serialization=True)


@pytest.mark.parametrize(
    ("make", "width"), [(vit, 16), (resnet, 16), (timm_model, 256)], ids=["vit", "resnet", "timm"]
)
def test_encoders_of_other_people_are_measured(
    make: Callable[[Path], Any], width: int, few: Path, tmp_path: Path
) -> None:
    make(tmp_path / "model")
    found = measure(tmp_path / "model", few, tmp_path, knn_k="5")
    stock = timm_features if make is timm_model else stock_features
    expected = knn_accuracy(tmp_path / "model", few, 5, stock)
    assert found["5-NN top-1 accuracy"]["value"] == pytest.approx(expected)
    assert strict(tmp_path / "out" / "results.json")["num_features"] == width


def test_an_encoder_on_the_hub_is_measured_from_the_command_line(
    encoder: Path, few: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in encoder.iterdir()}
    with running_hub() as hub:
        hub.repositories["models/org/theirs"] = Repository(True, [{}, files], {"main": 1})
        done = run(
            [sys.executable, *script(
                "--model=org/theirs", f"--dataset_name={few}", f"--output_dir={tmp_path / 'out'}",
                "--protocols=knn", "--knn_k=5",
            )],
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0",
            HF_TOKEN=READER,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5-NN top-1 accuracy: " in done.stdout
    results = strict(tmp_path / "out" / "results.json")
    assert results["model"] == "org/theirs"
    assert results["results"][0]["value"] == pytest.approx(knn_accuracy(encoder, few, 5))
    assert list((tmp_path / "home" / "vicreg_hf" / "features").glob("*/*.parquet"))


def test_two_processes_find_what_one_finds(
    found: dict[str, Any], encoder: Path, data: Path, tmp_path: Path
) -> None:
    words = script(
        f"--model={encoder}", f"--dataset_name={data}", f"--output_dir={tmp_path / 'out'}",
        "--protocols=knn,linear,linear-sgd", f"--cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    done = run_script(*words, processes=2)
    assert done.returncode == 0, done.stderr
    two = strict(tmp_path / "out" / "results.json")
    assert two["hardware"].endswith("2 processes")
    assert len(two["results"]) == 4
    for each in two["results"]:
        one = found[each["name"]]
        images = 1.01 if each["protocol"] == "linear-sgd" else 0  # of which rounding may decide
        assert each["value"] == pytest.approx(one["value"], abs=images / 120)
    losses = two["results"][-1]["details"]["losses"]
    expected = found["linear, authors' protocol top-1 accuracy"]["details"]["losses"]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert done.stdout.count("20-NN top-1 accuracy") == 1
