"""Which images and labels of a data set an evaluation uses, and where it refuses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, List
from measuring import (
    MANY,
    arguments,
    cell,
    digits,
    labels_of,
    measure,
    several,
    stock_features,
    strict,
    write,
)

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.metrics.svm import mean_average_precision, svm_scores

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


def test_images_that_are_bad_or_without_a_class_are_left_out_and_labels_stay_with_theirs(
    encoder: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)

    def alternating(count: int, bad: set[int], without: dict[int, Any]) -> tuple[Any, Any]:
        noise = random.integers(0, 100, (count, 32, 32, 3), dtype=np.uint8)
        kinds = np.arange(count) % 2  # of labels shifted by one none would be right
        images = noise + (150 * kinds).astype(np.uint8)[:, None, None, None]
        broken = {"bytes": b"<html>", "path": None}
        cells = [broken if k in bad else cell(images[k]) for k in range(count)]
        return cells, [without.get(k, int(kinds[k])) for k in range(count)]

    data = write(
        tmp_path / "data", ClassLabel(names=["dark", "light"]),
        train=alternating(64, {3, 40}, dict.fromkeys((5, 20, 21, 22), -1)),
        test=alternating(32, {0, 9, 10}, {4: None, 20: None, 21: -1}),
    )  # fmt: skip
    said, protocols = list[str](), "knn,linear,linear-sgd,retrieval,collapse"
    given = {"max_bad_fraction": 0.1, "lr_head": 1.0, "epochs": 10, "train_batch_size": 16}
    args = arguments(encoder, data, tmp_path, protocols, **given)
    results = evaluate(args, say=said.append)
    assert (results["num_train_images"], results["num_eval_images"]) == (58, 26)
    assert "4 of 62 images of data (train) have no class and are left out." in said
    assert "3 of 29 images of data (test) have no class and are left out." in said
    for each in results["results"]:
        assert each["num_images"] == (29 if each["protocol"] == "collapse" else 26)
        if each["percent"] and "precision" not in each["name"]:
            least = 0.8 if "losses" in each["details"] else 1
            assert each["value"] >= least, each["name"]


def test_classes_without_training_images_are_reported(encoder: Path, tmp_path: Path) -> None:
    images, _ = digits(range(8))  # 0 to 7
    seen, wanted = digits(range(100, 120))
    data = write(tmp_path / "data", train=(images, list(range(8))), test=(seen, wanted))
    said: list[str] = []
    args = arguments(encoder, data, tmp_path, "knn,linear,finetune-1,retrieval")
    args = replace(args, knn_k=None, retrieval_k=None)
    results = evaluate(args, say=said.append)["results"]
    number = sum(label >= 8 for label in wanted)
    assert said[0] == (
        f"{number} of 20 images of data (test) are of classes that no image of data (train) has: "
        "digit 8, digit 9."
    )
    # one image of each class is enough, with as many neighbours as there are
    found = {each["name"]: each for each in results}
    tried = found["linear probe top-1 accuracy"]["details"]["tried"]
    assert max(each["validation_accuracy"] for each in tried) > 0.5  # on what it learns from
    tuned = found["fine-tuning, 1 % of the labels top-1 accuracy"]
    assert tuned["settings"]["training_images"] == 8
    assert found.keys() >= {"8-NN top-1 accuracy", "recall at 1", "recall at 5"}
    assert "20-NN top-1 accuracy" not in found
    assert "recall at 10" not in found


def test_images_of_several_classes_are_measured_by_svms(encoder: Path, tmp_path: Path) -> None:
    (images, numbers), (others, wanted) = digits(range(40)), digits(range(100, 120))
    shown = [k for k, number in enumerate(wanted) if number != 7]  # a class that no test image has
    sets = several(numbers), several([wanted[k] for k in shown])
    data = write(
        tmp_path / "data", List(ClassLabel(names=MANY)), train=(images, sets[0]),
        test=([others[k] for k in shown], sets[1]),
    )  # fmt: skip
    (measured,) = measure(encoder, data, tmp_path, "svm").values()
    x, x_test = (stock_features(encoder, data, split) for split in ("train", "test"))
    target, truth = (np.array([[k in row for k in range(4)] for row in rows]) for rows in sets)
    scores, costs = svm_scores(x, target, x_test, seed=0)
    expected, precisions = mean_average_precision(scores, truth)
    for number, name in enumerate(MANY[:3]):
        own = measured["details"][name]
        assert own["cost"] == costs[number]
        assert own["average_precision"] == pytest.approx(precisions[number], abs=0.01)
    assert measured["details"]["seven"]["average_precision"] is None
    assert measured["value"] == pytest.approx(expected, abs=0.01)
    assert measured["low"] <= measured["value"] <= measured["high"]
    strict(tmp_path / "out" / "results.json")


def test_fine_tuning_learns_from_a_list_alone(encoder: Path, few: Path, tmp_path: Path) -> None:
    names, rows = tmp_path / "names.txt", np.flatnonzero(labels_of(few, "train") == 3)
    names.write_text("".join(f"{row}.png\n" for row in rows))
    given = {"label_list": str(names), "lr_head": 1.0, "epochs": 5}
    (measured,) = measure(encoder, few, tmp_path, "finetune", **given).values()
    assert measured["settings"]["training_images"] == len(rows)
    assert measured["value"] == pytest.approx((labels_of(few, "test") == 3).mean())  # and no other


@pytest.fixture(scope="module")
def strange(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets that do not suffice, by name."""
    root = tmp_path_factory.mktemp("strange")
    (train, numbers), (test, wanted) = digits(range(40)), digits(range(60, 80))
    lists = List(ClassLabel(names=MANY))
    write(root / "unlabelled", train=(train, None), test=(test, None))
    write(root / "unlabelled test", train=(train, numbers), test=(test, [-1] * 20))
    write(root / "one class", train=(train, [4] * 40), test=(test, wanted))
    write(root / "lists", lists, train=(train, several(numbers)), test=(test, several(wanted)))
    write(root / "rare", lists, train=(train, [[0, 1], [2]] * 20), test=(test, several(wanted)))
    write(root / "none shown", lists, train=(train, [[0, 1], [2, 3]] * 20), test=(test, [[]] * 20))
    (root / "few").symlink_to(few)
    (root / "list.txt").write_text("7.png\nabsent.png\n")
    (root / "file").touch()
    return root


REFUSALS: list[tuple[str, str, dict[str, Any], str]] = [
    ("unlabelled", "knn", {}, r"protocol knn needs labels .*name their column with --label_column"),
    ("unlabelled test", "finetune-1", {}, "protocol finetune-1 needs labels in both splits"),
    ("one class", "linear", {}, r"at least two classes, and .* shows only digit 4"),
    ("few", "svm", {}, "protocol svm needs lists of classes, and .* has one class an image"),
    ("lists", "svm,knn", {}, "protocol knn needs one class an image, and .* has lists of classes"),
    ("rare", "svm", {}, "needs at least 3 training images .* and 0 of 40 in .* show seven"),
    ("none shown", "svm", {}, "protocol svm needs images of some class, and .* shows none"),
    ("few", "finetune", {"label_list": "list.txt"}, "every listed name must be an image's, got '"),
    ("few", "knn", {"output_dir": "file/out"}, "output_dir must be a directory that can be"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "protocols", "given", "sentence"), REFUSALS)
def test_what_does_not_suffice_is_refused_before_an_image_is_encoded(
    name: str, protocols: str, given: dict[str, Any], sentence: str, strange: Path, encoder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(strange)  # where the files are
    with pytest.raises(ValueError, match=sentence) as refused:
        measure(encoder, strange / name, tmp_path, protocols, **({"knn_k": "5"} | given))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_collapse_is_measured_without_labels(strange: Path, encoder: Path, tmp_path: Path) -> None:
    found = measure(encoder, strange / "unlabelled", tmp_path, "collapse")
    assert 1 < found["effective rank of features"]["value"] < 20


def test_too_many_bad_images_are_refused_each_time(encoder: Path, tmp_path: Path) -> None:
    images, numbers = digits(range(40))
    images[:4] = [{"bytes": b"", "path": None}] * 4
    data = write(tmp_path / "data", train=(images, numbers), test=digits(range(60, 80)))
    for _ in range(2):  # the second finds the features of the first
        with pytest.raises(ImageError, match=r"max_bad_fraction=0.05 .* got 4 of 60"):
            measure(encoder, data, tmp_path, knn_k="5")
    assert not (tmp_path / "out" / "results.json").exists()
    measure(encoder, data, tmp_path, knn_k="5", max_bad_fraction=0.1)
