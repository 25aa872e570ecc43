"""Accuracy and confusions of classes, counted by other means."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reports import NAMES, Page, decoded, example, undrawn, written
from scipy.stats import binomtest


def section(page: Page) -> str:
    """The page from the accuracies of its classes on."""
    return page.html.partition('<section id="classes">')[2]


def bars(page: Page) -> list[list[str]]:
    """The name of each bar, its share with the interval, and its number of images."""
    items = re.findall(r'<li><span class="name">.*?</li>', section(page))
    return [[part for part in re.sub(r"<[^>]+>", "\t", item).split("\t") if part] for item in items]


def test_accuracy_and_confusions_of_each_class(tmp_path: Path) -> None:
    given = example(test_images=90, drawn=False)
    page = written(tmp_path, **given)
    labels, predicted = given["test"].labels.numpy(), given["predictions"]["linear"].numpy()
    expected = []
    for index, name in enumerate(NAMES):
        right = predicted[labels == index] == index
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        shares = [100 * share for share in (right.mean(), interval.low, interval.high)]
        text = "{:.1f} % ({:.1f} to {:.1f})".format(*shares)
        expected.append((right.mean(), [name, text, f"{len(right)} images"]))
    expected.sort(key=lambda entry: entry[0])
    assert bars(page) == [row for _, row in expected]
    widths = re.findall(r'class="fill" style="width: ([\d.]+)%', section(page))
    assert [float(w) for w in widths] == pytest.approx([100 * s for s, _ in expected], abs=0.01)
    assert "The classifier is linear, the most accurate of 2 classifiers" in page.text
    pairs, images = Counter(zip(labels, predicted, strict=True)), Counter(labels)
    table = page.tables["matrix"]
    assert table[0][1:] == list(NAMES)
    for true, row in enumerate(table[1:]):
        shares = [100 * pairs[true, taken] / images[true] for taken in range(4)]
        assert row == [NAMES[true], *(f"{share:.0f}" if share else "" for share in shares)]
    wrong = sorted((-count, pair) for pair, count in pairs.items() if pair[0] != pair[1])
    assert page.tables["pairs"][1:] == [
        [NAMES[true], NAMES[taken], str(-count), f"{-100 * count / images[true]:.1f} %"]
        for count, (true, taken) in wrong[:10]
    ]


def test_of_many_classes_the_worst_and_the_best_and_a_picture_are_shown(tmp_path: Path) -> None:
    labels, place = torch.arange(60).repeat_interleave(60), torch.arange(60).repeat(60)
    predicted = torch.where(place < labels, labels, (labels + 1) % 60)  # class k has k right
    names = [f"c{k}" for k in range(60)]
    page = written(tmp_path, predictions={"a": predicted}, test=undrawn(labels), class_names=names)
    assert [bar[0] for bar in bars(page)] == [f"c{k}" for k in (*range(20), *range(50, 60))]
    assert "30 classes between the 20 worst and the 10 best are not shown" in page.text
    assert "matrix" not in page.tables
    [uri] = page.values("img", "src")
    opacity = np.array(Image.open(io.BytesIO(decoded(uri))).convert("RGBA"))[..., 3] / 255
    right = np.arange(60) / 60
    expected = np.diag(right) + np.roll(np.diag(1 - right), 1, axis=1)
    np.testing.assert_allclose(opacity, np.sqrt(expected), atol=0.003)
    assert page.tables["pairs"][1] == ["c0", "c1", "60", "100.0 %"]


def test_classes_without_a_test_image_are_counted_and_missing_names_made_up(tmp_path: Path) -> None:
    labels, names = torch.tensor([0, 1, 4, 4]), ["cat", "", "dog", "", " "]
    page = written(tmp_path, predictions={"a": labels}, test=undrawn(labels), class_names=names)
    assert [bar[0] for bar in bars(page)] == ["cat", "class 1", "class 4"]
    assert "2 classes have no test image" in page.text
    assert "No image was misclassified" in page.text


def test_ten_thousand_classes_have_no_matrix(tmp_path: Path) -> None:
    labels, names = torch.arange(10_000), [f"c{k}" for k in range(10_000)]
    predictions = {"a": labels.flip(0)}
    page = written(tmp_path, predictions=predictions, test=undrawn(labels), class_names=names)
    assert "matrix" not in page.tables
    assert not page.values("img", "src")
    assert len(page.tables["pairs"]) == 11
