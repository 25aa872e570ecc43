"""Evaluations as users start them: against stock loaders and scikit-learn, and refused."""

from __future__ import annotations

import html
import io
import json
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from hub import READER, Repository, running_hub
from huggingface_hub import ModelCard
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from test_encoders import resnet, vicreg, vit
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel
from warm import run_script
from workflow import SMALL, run

from vicreg_hf import pretrain
from vicreg_hf.arguments import parse_arguments
from vicreg_hf.evaluating import evaluate
from vicreg_hf.evaluation.arguments import EvaluationArguments
from vicreg_hf.evaluation.results import Measurement
from vicreg_hf.images import ImageError
from vicreg_hf.randomness import permutation

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")

NAMES = [f"digit {number}" for number in range(10)]
ALL = "knn,linear,linear-sgd,finetune-10,retrieval,collapse"
QUICK: dict[str, Any] = {
    "knn_k": "5,20", "retrieval_k": "1,10", "num_workers": 0, "probe_epochs": 5, "epochs": 2,
}  # fmt: skip
"""Settings with which a protocol takes a second."""


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
        yield


def cell(pixels: NDArray[np.uint8], path: str | None = None) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def digits(rows: range) -> tuple[list[dict[str, Any]], list[int]]:
    """Some of scikit-learn's handwritten digits, of 32 x 32 pixels, and what they show."""
    bundle: Any = load_digits()
    scans = (bundle.images * 15.9).astype(np.uint8)
    return [cell(scans[row], f"{row}.png") for row in rows], bundle.target[rows].tolist()


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
    """Of an evaluation: each measurement by its name."""
    results = evaluate(arguments(*words, **given), say=lambda _: None)
    return {measurement["name"]: measurement for measurement in results["results"]}


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def stock_features(directory: Path, data: Path, split: str) -> NDArray[np.float32]:
    """Of each image, by transformers alone."""
    model: Any = AutoModel.from_pretrained(directory)
    processor: Any = AutoImageProcessor.from_pretrained(directory)
    table: Any = Dataset.from_parquet(str(data / f"{split}.parquet"))
    with torch.no_grad():
        views = [processor(image, return_tensors="pt")["pixel_values"] for image in table["image"]]
        return model.eval()(torch.cat(views)).pooler_output.flatten(1).numpy()


def labels_of(data: Path, split: str) -> NDArray[np.int64]:
    table: Any = Dataset.from_parquet(str(data / f"{split}.parquet"))
    return np.array(table["label"][:])


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
    root = tmp_path_factory.mktemp("few") / "few"
    return write(root, train=digits(range(40)), test=digits(range(60, 80)))


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


def script(*flags: str) -> list[str]:
    quick = [f"--{name}={value}" for name, value in QUICK.items()]
    return ["scripts/evaluate.py", *quick, *flags]


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


# Labels


def test_images_that_cannot_be_used_are_left_out_and_labels_stay_with_theirs(
    encoder: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)

    def alternating(count: int, bad: set[int]) -> tuple[list[Any], list[int]]:
        noise = random.integers(0, 100, (count, 32, 32, 3), dtype=np.uint8)
        kinds = np.arange(count) % 2  # of labels shifted by one none would be right
        images = noise + (150 * kinds).astype(np.uint8)[:, None, None, None]
        broken = {"bytes": b"<html>", "path": None}
        return [broken if k in bad else cell(images[k]) for k in range(count)], kinds.tolist()

    kinds = ClassLabel(names=["dark", "light"])
    parts = {"train": alternating(64, {3, 40}), "test": alternating(32, {0, 9, 10})}
    data = write(tmp_path / "data", kinds, **parts)
    protocols = "knn,linear,linear-sgd,finetune,retrieval,collapse"
    given = {"max_bad_fraction": 0.1, "lr_head": 1.0, "epochs": 10, "train_batch_size": 16}
    found = measure(encoder, data, tmp_path, protocols, **given)
    results = strict(tmp_path / "out" / "results.json")
    assert (results["num_train_images"], results["num_eval_images"]) == (62, 29)
    for each in found.values():
        assert each["num_images"] == 29
        if each["percent"] and "precision" not in each["name"]:
            least = 0.8 if "losses" in each["details"] else 1
            assert each["value"] >= least, each["name"]


def test_one_image_of_each_class_is_enough(encoder: Path, tmp_path: Path) -> None:
    images, _ = digits(range(10))  # 0 to 9
    data = write(tmp_path / "data", train=(images, list(range(10))), test=digits(range(60, 80)))
    found = measure(encoder, data, tmp_path, "knn,linear,finetune-1", knn_k="1")
    tried = found["linear probe top-1 accuracy"]["details"]["tried"]
    assert max(each["validation_accuracy"] for each in tried) > 0.5  # on what it learns from
    tuned = found["fine-tuning, 1 % of the labels top-1 accuracy"]
    assert tuned["settings"]["training_images"] == 10


MANY = ["even", "large", "round", "seven"]


def several(numbers: Sequence[int]) -> list[list[int]]:
    rules = (lambda d: d % 2 == 0, lambda d: d > 4, lambda d: d in (0, 6, 8, 9), lambda d: d == 7)
    return [[k for k, holds in enumerate(rules) if holds(digit)] for digit in numbers]


@pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
def test_images_of_several_classes_are_measured_by_svms(
    named: bool, encoder: Path, tmp_path: Path
) -> None:
    images, numbers = digits(range(90))
    others, wanted = digits(range(100, 160))
    shown = [k for k, number in enumerate(wanted) if number != 7]  # a class that no test image has
    sets = (several(numbers), several([wanted[k] for k in shown]))
    data = tmp_path / "data"
    kind: Any = List(ClassLabel(names=MANY))
    if named:
        kind, given = List(Value("string")), {"label_column": "label"}
        sets = tuple([[MANY[k] for k in row] for row in rows] for rows in sets)
    else:
        given = {}
    write(data, kind, train=(images, sets[0]), test=([others[k] for k in shown], sets[1]))
    (measured,) = measure(encoder, data, tmp_path, "svm", **given).values()
    x, x_test = (normalize(stock_features(encoder, data, s)) for s in ("train", "test"))
    expected = []
    for name in MANY[:3]:
        cost = measured["details"][name]["cost"]
        wanted_name = name if named else MANY.index(name)
        target, truth = ([wanted_name in row for row in rows] for rows in sets)
        svm = LinearSVC(C=cost, class_weight={True: 2, False: 1}, random_state=0, max_iter=2000)
        with pytest.warns() if cost > 1 else pytest.MonkeyPatch.context():
            scores = svm.fit(x, target).decision_function(x_test)
        expected.append(average_precision_score(truth, scores))
        own = measured["details"][name]["average_precision"]
        assert own == pytest.approx(expected[-1], abs=0.01)
    assert measured["details"]["seven"]["average_precision"] is None
    assert measured["value"] == pytest.approx(np.mean(expected), abs=0.01)
    assert measured["low"] <= measured["value"] <= measured["high"]
    strict(tmp_path / "out" / "results.json")


def test_fine_tuning_learns_from_the_images_of_a_list_alone(
    encoder: Path, few: Path, tmp_path: Path
) -> None:
    numbers, names = labels_of(few, "train"), tmp_path / "names.txt"
    rows = np.flatnonzero(numbers == 3)
    names.write_text("".join(f"{row}.png\n" for row in rows))
    given = {"label_list": str(names), "lr_head": 1.0, "epochs": 5}
    (measured,) = measure(encoder, few, tmp_path, "finetune", **given).values()
    assert measured["settings"]["training_images"] == len(rows)
    assert measured["value"] == pytest.approx((labels_of(few, "test") == 3).mean())  # and no other
    given = {"label_fraction": 0.5, "epochs": 1}
    (half,) = measure(encoder, few, tmp_path, "finetune", **given).values()
    sizes = np.bincount(numbers)
    assert half["settings"]["training_images"] == sum(max(1, round(n / 2)) for n in sizes)


# Bad input


@pytest.fixture(scope="module")
def strange(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets that do not suffice, by name."""
    root = tmp_path_factory.mktemp("strange")
    (train, numbers), (test, wanted) = digits(range(40)), digits(range(60, 80))
    lists = List(ClassLabel(names=MANY))
    write(root / "unlabelled", train=(train, None), test=(test, None))
    write(root / "unlabelled test", train=(train, numbers), test=(test, [-1] * 20))
    write(root / "one class", train=(train, [4] * 40), test=(test, wanted))
    write(root / "one split", train=(train, numbers))
    write(root / "lists", lists, train=(train, several(numbers)), test=(test, several(wanted)))
    write(root / "rare", lists, train=(train, [[0, 1], [2]] * 20), test=(test, several(wanted)))
    write(root / "none shown", lists, train=(train, [[0, 1], [2, 3]] * 20), test=(test, [[]] * 20))
    write(root / "names", train=(train, numbers))
    others = ClassLabel(names=[*NAMES[:9], "dozen"])
    write(root / "names", others, test=(test, wanted))
    words = [NAMES[number] for number in wanted]
    write(root / "words", Value("string"), train=(train, [NAMES[n] for n in numbers]))
    write(root / "words", Value("string"), test=(test, ["gross", *words[1:]]))
    (root / "few").symlink_to(few)
    (root / "list.txt").write_text("7.png\nabsent.png\n")
    (root / "file").touch()
    return root


REFUSALS: list[tuple[str, str, dict[str, Any], str]] = [
    ("unlabelled", "knn", {}, r"protocol knn needs labels .*name their column with --label_column"),
    ("unlabelled", "finetune-1", {}, "protocol finetune-1 needs labels in both splits"),
    ("unlabelled test", "linear", {}, "protocol linear needs labels in both splits"),
    ("few", "knn", {"label_column": "kind"}, "label_column must name a column, got 'kind'"),
    ("few", "knn", {"label_column": "image"}, "label_column must hold classes, or lists of them"),
    ("names", "knn", {}, r"only names \(test\) has dozen and only names \(train\) has digit 9"),
    ("words", "knn", {"label_column": "label"}, r"only words \(test\) has gross; choose another"),
    ("one class", "linear", {}, r"at least two classes, and .* shows only digit 4"),
    ("few", "knn", {"knn_k": "5,41"}, "knn_k must be at most the number of training images, got 4"),
    ("few", "retrieval", {"retrieval_k": "100"}, "retrieval_k must be at most the number of"),
    ("one split", "knn", {}, "eval_split must be given where none is called test, validation"),
    ("few", "knn", {"eval_split": "dev"}, "split must be one of train, test, got 'dev'"),
    ("few", "knn", {"train_split": "dev"}, "split must be one of train, test, got 'dev'"),
    ("few", "svm", {}, "protocol svm needs lists of classes, and .* has one class an image"),
    ("lists", "knn", {}, "protocol knn needs one class an image, and .* has lists of classes"),
    ("lists", "knn,svm", {}, "protocol knn needs one class an image"),
    ("rare", "svm", {}, "needs at least 3 training images .* and 0 of 40 in .* show seven"),
    ("none shown", "svm", {}, "protocol svm needs images of some class, and .* shows none"),
    ("few", "finetune", {"label_list": "list.txt"}, "every listed name must be an image's, got '"),
    ("few", "finetune", {"label_list": "no.txt"}, "a list of images must be a text file, got"),
    ("few", "knn", {"output_dir": "file/out"}, "output_dir must be a directory that can be"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "protocols", "given", "sentence"), REFUSALS)
def test_what_does_not_suffice_is_refused_before_an_image_is_encoded(
    name: str, protocols: str, given: dict[str, Any], sentence: str, strange: Path, encoder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    placed = given | {
        place: str(strange / given[place]) for place in ("label_list", "output_dir")
        if place in given
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence) as refused:
        measure(encoder, strange / name, tmp_path, protocols, **({"knn_k": "5"} | placed))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_the_command_line_refuses_in_one_sentence(
    strange: Path, encoder: Path, tmp_path: Path
) -> None:
    done = run_script(*script(
        f"--model={encoder}", f"--dataset_name={strange / 'names'}", "--knn_k=5",
        f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}",
    ))  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: class names must be the same in both")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_collapse_is_measured_without_labels(strange: Path, encoder: Path, tmp_path: Path) -> None:
    for name in ("unlabelled", "unlabelled test", "lists"):
        found = measure(encoder, strange / name, tmp_path, "collapse")
        assert 1 < found["effective rank"]["value"] < 20


def test_too_many_bad_images_are_refused_each_time(encoder: Path, tmp_path: Path) -> None:
    images, numbers = digits(range(40))
    images[:4] = [{"bytes": b"", "path": None}] * 4
    data = write(tmp_path / "data", train=(images, numbers), test=digits(range(60, 80)))
    for _ in range(2):  # the second finds the features of the first
        with pytest.raises(ImageError, match=r"max_bad_fraction=0.05 .* got 4 of 60"):
            measure(encoder, data, tmp_path, knn_k="5")
    assert not (tmp_path / "out" / "results.json").exists()
    measure(encoder, data, tmp_path, knn_k="5", max_bad_fraction=0.1)


# The card


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run, with a card."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    own = [f"--dataset_name={data}", f"--output_dir={directory}", "--max_steps=2"]
    pretrain(parse_arguments([*SMALL, *own]))
    return directory


def own_results(card: Any, dataset: str) -> list[tuple[str, float]]:
    results = card.data.eval_results or []
    return [(each.metric_name, each.metric_value) for each in results
            if each.dataset_name == dataset and "accuracy" in each.metric_name]  # fmt: skip


def test_results_that_are_not_measured_anew_are_kept(few: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()

    def again(model: Path, protocols: str, **given: Any) -> dict[str, Any]:
        return evaluate(arguments(model, few, tmp_path, protocols, **given), say=said.append)

    model = write_encoder(tmp_path / "model")
    first = again(model, "collapse,retrieval")
    again(model, "retrieval,collapse")  # the same, so that one is enough
    again(model, "collapse,knn,retrieval", knn_k="5")
    assert [path.name for path in out.iterdir() if path.is_dir()] == []
    wide = strict(out / "results.json")
    assert {m["name"] for m in first["results"]} < {m["name"] for m in wide["results"]}
    report = (out / "report.html").read_bytes()
    again(model, "collapse")
    assert f"What was in {out} before is now in {out / 'earlier-1'}: " in "".join(said)
    assert strict(out / "earlier-1" / "results.json") == wide
    assert (out / "earlier-1" / "report.html").read_bytes() == report
    another = write_encoder(tmp_path / "another", seed=1)
    again(another, "collapse")
    assert strict(out / "earlier-2" / "results.json")["model"] == "model"
    (out / "results.json").write_text('["mine"]')
    again(another, "collapse")
    assert strict(out / "earlier-3" / "results.json") == ["mine"]


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_results_that_cannot_be_written_leave_those_before(
    name: str, few: Path, tmp_path: Path
) -> None:
    model, out = write_encoder(tmp_path / "model"), tmp_path / "out"
    measure(model, few, tmp_path, "collapse,retrieval")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) // 2, most))
    try:
        with pytest.raises(ValueError, match=rf"must be a directory .*large: '{out / name}'. What"):
            measure(model, few, tmp_path, "collapse")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_card_of_a_run_gets_each_result_once(
    trained: Path, few: Path, encoder: Path, tmp_path: Path
) -> None:
    path = trained / "encoder" / "README.md"
    before = path.read_text()
    measure(trained, few, tmp_path, "knn", knn_k="5", update_card=False)
    assert path.read_text() == before
    card: Any = ModelCard(before)
    others = card.data.eval_results or []
    for protocols in ("knn,linear", "knn,retrieval,collapse"):
        found = measure(trained, few, tmp_path, protocols, knn_k="5")
    write(tmp_path / "other", train=digits(range(30)), test=digits(range(80, 90)))
    measure(trained / "encoder", tmp_path / "other", tmp_path, "knn", knn_k="5")
    measure(trained, few, tmp_path, "linear")  # results of earlier evaluations stay
    assert strict(tmp_path / "out" / "results.json")["model"] == "run"
    after: Any = ModelCard(path.read_text())
    results = {(e.dataset_name, e.metric_name): e.metric_value for e in after.data.eval_results}
    assert len(results) == len(after.data.eval_results) == len(others) + 5 + 1 + 1
    section = after.text.split("<!-- evaluation: few (test) -->")[1].split("<!-- end")[0]
    for name, each in found.items():
        shown = Measurement(**each).shown
        assert section.count(f"| {name} | {shown} | 20 |") == 1
        if each["percent"]:
            assert results["few", name] == round(100 * each["value"], 2)
    assert after.text.count("## Evaluation on few (test)") == 1
    assert after.text.count("## Evaluation on other (test)") == 1
    assert after.text.index("## Evaluation on other") < after.text.index("\n## Training\n")
    assert {(e.dataset_name, e.metric_name) for e in others} <= results.keys()
    assert after.data.license == card.data.license
    assert after.data.tags == card.data.tags
    lines = after.text.splitlines()
    for line in card.text.splitlines():  # in their order
        lines = lines[lines.index(line) + 1 :]
    assert not [path for path in (trained / "encoder").iterdir() if path.suffix == ".partial"]
    assert not (encoder / "README.md").exists()  # none is made where there was none


def test_a_card_with_metadata_that_cannot_be_read_is_left_as_it_is(
    few: Path, tmp_path: Path
) -> None:
    model = write_encoder(tmp_path / "model")
    broken = "---\nlicense: [mit\n---\n# mine\n"
    unfinished = "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: x}\n---\n# mine\n"
    for text in (broken, unfinished):
        (model / "README.md").write_text(text)
        said: list[str] = []
        evaluate(arguments(model, few, tmp_path, knn_k="5"), say=said.append)
        assert (model / "README.md").read_text() == text
        assert "warning: " in said[-1]
        assert "README.md was left as it was" in said[-1]
        assert strict(tmp_path / "out" / "results.json")["results"]
    (model / "README.md").write_text("# mine\n\nNo metadata.\n")
    said = []
    evaluate(arguments(model, few, tmp_path, knn_k="5"), say=said.append)
    assert said[-1].startswith(f"The results were added to {model / 'README.md'}; --no_update_card")
    card: Any = ModelCard.load(model / "README.md")
    assert card.text.strip().startswith("# mine\n\nNo metadata.\n")
    assert [name for name, _ in own_results(card, "few")] == ["5-NN top-1 accuracy"]


def test_images_without_a_class_are_left_out(tmp_path: Path) -> None:
    (images, labels), (seen, shown) = digits(range(300)), digits(range(300, 400))
    model = write_encoder(tmp_path / "model")
    partly = [label if row % 3 else -1 for row, label in enumerate(labels)]
    some = [label if row % 2 else None for row, label in enumerate(shown)]
    whole = write(tmp_path / "whole", train=(images, partly), test=(seen, some))
    kept = [row for row in range(300) if row % 3], [row for row in range(100) if row % 2]
    alone = write(
        tmp_path / "alone",
        train=([images[row] for row in kept[0]], [labels[row] for row in kept[0]]),
        test=([seen[row] for row in kept[1]], [shown[row] for row in kept[1]]),
    )
    said: list[str] = []
    protocols = "knn,linear,retrieval,finetune,finetune-10"
    given = arguments(model, whole, tmp_path / "a", protocols + ",collapse")
    found = {m["name"]: m for m in evaluate(given, say=said.append)["results"]}
    expected = measure(model, alone, tmp_path / "b", protocols)
    for name in ("20-NN top-1 accuracy", "linear probe top-1 accuracy", "recall at 1"):
        assert found[name]["value"] == expected[name]["value"]
    assert found.keys() >= expected.keys()
    assert {found[name]["num_images"] for name in expected} == {50}
    assert found["effective rank"]["num_images"] == 100
    assert "100 of 300 images of whole (train) have no class and are left out." in said
    assert "50 of 100 images of whole (test) have no class and are left out." in said
