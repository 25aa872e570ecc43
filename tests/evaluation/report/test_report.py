"""The report: numbers against others' arithmetic, and what its page holds."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pictures import photographs
from PIL import Image
from reports import (
    HOSTILE,
    MEASUREMENTS,
    NAMES,
    ONLY_CLASSES,
    Page,
    decoded,
    example,
    gallery,
    random,
    written,
)
from scipy.stats import binomtest

from vicreg_hf.evaluation.report.report import write_report

# --- results


def test_measurements_stand_in_a_table(tmp_path: Path) -> None:
    page = written(tmp_path, title="t", facts={}, measurements=MEASUREMENTS)
    assert page.tables["measurements"][1:] == [
        ["20-NN top-1 accuracy", "81.25 % (79.00 to 83.00)", "1,234",
         "k 20, temperature 0.07, seed 3"],
        ["effective rank", "37.22", "60", "seed 0"],
    ]  # fmt: skip
    assert "interval over resampled test images" in page.text
    assert "not told apart" in page.text


def test_intervals_are_not_explained_where_there_are_none(tmp_path: Path) -> None:
    page = written(tmp_path, title="t", facts={}, measurements=MEASUREMENTS[1:])
    assert "resampled" not in page.text


def paired_bootstrap(difference: NDArray[np.float64]) -> NDArray[np.float64]:
    random = np.random.default_rng(99)
    rows = random.integers(len(difference), size=(4000, len(difference)))
    return np.quantile(difference[rows].mean(1), [0.025, 0.975])


def test_differences_are_those_over_the_same_resampled_images(tmp_path: Path) -> None:
    given = example(test_images=400) | ONLY_CLASSES
    labels, predictions = given["labels"], given["predictions"]
    predictions["linear again"] = predictions["linear"].clone()
    rows = written(tmp_path, **given).tables["differences"][1:]
    assert [row[0] for row in rows] == [
        "linear over linear again", "linear over 20-NN", "linear again over 20-NN",
    ]  # fmt: skip
    assert rows[0][1:] == ["+0.00 (+0.00 to +0.00)", "within noise"]
    right = [(predictions[name] == labels).double().numpy() for name in ("linear", "20-NN")]
    shown = [float(number) for number in re.findall(r"[+-][\d.]+", rows[1][1])]
    assert shown[0] == pytest.approx(100 * (right[0].mean() - right[1].mean()), abs=0.005)
    # one image is 0.25 points, and both ends are estimates
    assert shown[1:] == pytest.approx(100 * paired_bootstrap(right[0] - right[1]), abs=0.6)
    assert rows[1][2] == "beyond noise"


def test_a_small_difference_is_within_noise(tmp_path: Path) -> None:
    labels = torch.zeros(50, dtype=torch.long)
    predictions = {"a": labels.clone(), "b": labels.clone()}
    predictions["a"][:3], predictions["b"][3:7] = 1, 1
    page = written(
        tmp_path, title="t", facts={}, measurements=[], predictions=predictions, labels=labels
    )
    [row] = page.tables["differences"][1:]
    assert row[0] == "a over b"
    assert row[1].startswith("+2.00 (-")
    assert row[2] == "within noise"


# --- classes


def bars(page: Page) -> list[list[str]]:
    """Name, share with interval, and images, of each bar."""
    items = re.findall(r'<li><span class="name">.*?</li>', page.html)
    return [re.sub(r"<[^>]+>", "\t", item).split("\t") for item in items]


def test_accuracy_of_each_class_with_its_interval(tmp_path: Path) -> None:
    given = example(test_images=90) | ONLY_CLASSES
    page = written(tmp_path, **given)
    labels, predicted = given["labels"].numpy(), given["predictions"]["linear"].numpy()
    expected = []
    for index, name in enumerate(NAMES):
        right = predicted[labels == index] == index
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        shown = (
            f"{100 * right.mean():.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
        )
        expected.append((right.mean(), [name, shown, f"{len(right)} images"]))
    expected.sort(key=lambda entry: entry[0])
    assert [[part for part in bar if part] for bar in bars(page)] == [row for _, row in expected]
    widths = re.findall(r'class="fill" style="width: ([\d.]+)%', page.html)
    assert [float(w) for w in widths] == pytest.approx([100 * s for s, _ in expected], abs=0.01)
    assert "Of linear, the most accurate of 2 classifiers" in page.text


def test_of_many_classes_the_worst_and_the_best_are_shown(tmp_path: Path) -> None:
    labels = torch.arange(60).repeat_interleave(60)
    place = torch.arange(60).repeat(60)
    predicted = torch.where(place < labels, labels, (labels + 1) % 60)  # class k has k right
    page = written(
        tmp_path, title="t", facts={}, measurements=[], predictions={"linear": predicted},
        labels=labels, class_names=[f"c{k}" for k in range(60)],
    )  # fmt: skip
    names = [next(part for part in bar if part) for bar in bars(page)]
    assert names == [f"c{k}" for k in (*range(20), *range(50, 60))]
    assert "30 classes between the 20 worst and the 10 best are not shown" in page.text


def test_classes_without_a_test_image_are_counted_and_missing_names_made_up(tmp_path: Path) -> None:
    given = {"title": "t", "facts": {}, "measurements": [], "class_names": ["cat", "", "dog"]}
    labels = torch.tensor([0, 1, 4, 4])
    page = written(tmp_path, **given, predictions={"a": labels}, labels=labels)
    assert [next(part for part in bar if part) for bar in bars(page)] == [
        "cat", "class 1", "class 4",
    ]  # fmt: skip
    assert "2 classes have no test image" in page.text
    assert "No image was misclassified" in page.text


def test_confusion_matrix_and_pairs_are_counted_right(tmp_path: Path) -> None:
    given = example(test_images=90) | ONLY_CLASSES
    page = written(tmp_path, **given)
    labels, predicted = given["labels"].tolist(), given["predictions"]["linear"].tolist()
    pairs = Counter(zip(labels, predicted, strict=True))
    images = Counter(labels)
    table = page.tables["matrix"]
    assert table[0][1:] == list(NAMES)
    for true, row in enumerate(table[1:]):
        shares = [100 * pairs[true, taken] / images[true] for taken in range(4)]
        assert row == [NAMES[true], *(f"{share:.0f}" if share else "" for share in shares)]
    wrong = sorted(
        ((-count, pair) for pair, count in pairs.items() if pair[0] != pair[1])
    )  # fmt: skip
    assert page.tables["pairs"][1:] == [
        [NAMES[true], NAMES[taken], str(-count), f"{-100 * count / images[true]:.1f} %"]
        for count, (true, taken) in wrong[:10]
    ]


def test_confusions_of_more_classes_are_a_picture_with_the_shares_as_opacity(
    tmp_path: Path,
) -> None:
    labels = torch.arange(20).repeat_interleave(10)
    predicted = labels.clone()
    predicted[:4] = 7  # four tenths of class 0
    page = written(
        tmp_path, title="t", facts={}, measurements=[], predictions={"a": predicted}, labels=labels
    )
    assert "matrix" not in page.tables
    [uri] = page.values("img", "src")
    opacity = np.array(Image.open(io.BytesIO(decoded(uri))).convert("RGBA"))[..., 3] / 255
    expected = np.eye(20)
    expected[0, [0, 7]] = [0.6, 0.4]
    np.testing.assert_allclose(opacity, np.sqrt(expected), atol=0.003)
    assert page.tables["pairs"][1] == ["class 0", "class 7", "4", "40.0 %"]


def test_ten_thousand_classes_have_no_matrix(tmp_path: Path) -> None:
    labels = torch.arange(10_000)
    page = written(
        tmp_path, title="t", facts={}, measurements=[], predictions={"a": labels.flip(0)},
        labels=labels,
    )  # fmt: skip
    assert "matrix" not in page.tables
    assert not page.values("img", "src")
    assert len(page.tables["pairs"]) == 11


# --- the page


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    full = example()
    sections = ("results", "facts", "classes", "confusions", "spectrum", "map", "neighbours")
    absent: list[tuple[dict[str, Any], set[str]]] = [
        ({}, set()),
        ({"facts": {}}, {"facts"}),
        ({"predictions": None}, {"classes", "confusions"}),
        ({"train": None}, {"neighbours"}),
        ({"test": None}, {"map", "neighbours"}),
        ({"measurements": [], "predictions": None}, {"results", "classes", "confusions"}),
        ({"facts": {}, "measurements": [], "predictions": None, "labels": None, "train": None,
          "test": None}, set(sections)),
    ]  # fmt: skip
    for changes, missing in absent:
        page = written(tmp_path, **full | changes)
        found = page.values("section", "id")
        assert found == [section for section in sections if section not in missing]
        linked = [link.removeprefix("#") for link in page.values("a", "href")]
        assert linked == found


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    given = example() | {"class_names": HOSTILE, "title": HOSTILE[0]}
    given["facts"] = {HOSTILE[0]: HOSTILE[1]}
    given["measurements"] = [replace(MEASUREMENTS[0], name=HOSTILE[1], settings={"k": HOSTILE[0]})]
    given["predictions"] = {HOSTILE[0]: given["labels"], HOSTILE[1]: given["labels"]}
    page = written(tmp_path, **given)
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    assert page.values("img", "src") == [
        uri for uri in page.values("img", "src") if uri.startswith("data:image/")
    ]
    assert page.lines.count(HOSTILE[0]) > 5
    assert HOSTILE[2] in page.lines
    assert page.tables["measurements"][1][0] == HOSTILE[1]


def test_the_page_refers_to_nothing_outside_it(tmp_path: Path) -> None:
    page = written(tmp_path, **example())
    references = [
        value
        for _, given in page.elements
        for name, value in given.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    ]
    assert len(references) > 80
    assert [value for value in references if not (value or "").startswith(("#", "data:"))] == []
    assert re.findall(r"url\((?!#)", page.html) == []
    assert "http" not in page.html
    assert "@import" not in page.html


def test_ids_are_unique_and_references_to_them_hold(tmp_path: Path) -> None:
    page = written(tmp_path, **example())
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:href="|url\()#([^")]+)', page.html)
    assert len(named) > 60
    assert set(named) <= set(ids)


def test_every_picture_is_described(tmp_path: Path) -> None:
    page = written(tmp_path, **example(20))
    images = [given for tag, given in page.elements if tag == "img"]
    assert len(images) > 60
    assert all(given.get("alt") for given in images)
    figures = [given for tag, given in page.elements if tag == "svg" and "role" in given]
    assert len(figures) == 4
    assert all(given["role"] == "img" and given["aria-label"] for given in figures)


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    first = write_report(tmp_path / "a" / "report.html", **example())
    second = write_report(tmp_path / "b" / "report.html", **example())
    assert first.read_bytes() == second.read_bytes()
    other = write_report(tmp_path / "c" / "report.html", **example(), seed=1)
    assert first.read_bytes() != other.read_bytes()


def test_the_file_is_small(tmp_path: Path) -> None:
    given = example(10)
    large = list(photographs(10, 400, 600))
    for split in ("train", "test"):
        given[split] = replace(
            given[split], read=lambda rows: [large[row % len(large)] for row in rows]
        )
    path = write_report(tmp_path / "report.html", **given)
    assert path.stat().st_size < 1_000_000
    uris = Page(path).values("img", "src")
    assert len(uris) > 80
    assert max(max(Image.open(io.BytesIO(decoded(uri))).size) for uri in uris) == 96


def test_half_a_surrogate_pair_does_not_cost_the_report(tmp_path: Path) -> None:
    page = written(tmp_path, title="a \ud83d b", facts={}, measurements=[])
    assert "a ? b" in page.lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(59, dtype=torch.long)}, "got 60 of 20-NN and 59 labels"),
        ({"labels": -torch.ones(60, dtype=torch.long)}, "labels must be one class from 0"),
        ({"predictions": {"a": torch.rand(60)}}, "a must be one class from 0.*float32"),
        ({"test": gallery(random(3, 4), torch.zeros(2).long(), [])}, "test.features needs one"),
        ({"train": gallery(random(3), None, [])}, "features of train must be"),
        ({"test": gallery(random(3, 4), None, [])}, "got 3 rows and 60 labels"),
    ],
)  # fmt: skip
def test_input_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", **example() | changes)
    assert not (tmp_path / "report.html").exists()
