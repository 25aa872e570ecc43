"""The report: numbers against others' arithmetic, and what its page holds."""

from __future__ import annotations

import base64
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
    example,
    gallery,
    random,
    written,
)
from scipy.stats import binomtest
from sklearn.decomposition import PCA
from torch import Tensor

from vicreg_hf.evaluation.charts import COLOURS
from vicreg_hf.evaluation.neighbours import CASES, NEIGHBOURS
from vicreg_hf.evaluation.report import write_report

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


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2], validate=True)


# --- features


def points(svg: str) -> NDArray[np.float64]:
    """Places (n, 2) of a figure's marks, y upwards."""
    found = re.findall(r'<use xlink:href="[^"]*" x="([\d.-]+)" y="([\d.-]+)" style="fill', svg)
    return np.array(found, dtype=np.float64) * [1, -1]


def spectrum_marks(svg: str) -> NDArray[np.float64]:
    """Those of the curve, without the ticks of the axes."""
    curve = re.search(r'clip-path="[^"]*">\s*(<use.*?)</g>', svg, re.DOTALL)
    assert curve is not None
    return points(curve[1])


def test_spectrum_is_that_of_the_centred_training_features(tmp_path: Path) -> None:
    features = random(300, 8) @ torch.diag(torch.logspace(0, -3, 8)) + 5
    train = gallery(features, None, [])
    page = written(tmp_path, title="t", facts={}, measurements=[], train=train)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    marks = spectrum_marks(page.figure("spectrum"))
    assert len(marks) == 8
    assert np.corrcoef(marks[:, 1], np.log(singular))[0, 1] > 1 - 1e-9
    p = singular / singular.sum()
    assert f"Effective rank {np.exp(-(p * np.log(p)).sum()):.1f} of at most 8" in page.text
    assert "From 300 training images, 8 dimensions." in page.text
    std = centred.std(0, ddof=1)
    [described] = [a for a in page.values("svg", "aria-label") if "deviation" in a]
    assert f"8 dimensions, from {std.min():.2g} to {std.max():.2g}" in described
    [described] = [a for a in page.values("svg", "aria-label") if "correlation" in a]
    off_diagonal = np.corrcoef(centred.T)[np.triu_indices(8, k=1)]
    assert f"28 pairs, from {off_diagonal.min():.2g} to {off_diagonal.max():.2g}" in described


def test_spectrum_ends_where_only_rounding_is_left(tmp_path: Path) -> None:
    train = gallery(random(300, 3) @ random(3, 8, seed=1), None, [])
    page = written(tmp_path, title="t", facts={}, measurements=[], train=train)
    assert len(spectrum_marks(page.figure("spectrum"))) == 3


def test_test_features_stand_in_for_absent_training_features(tmp_path: Path) -> None:
    test = gallery(random(20, 4), None, [])
    page = written(tmp_path, title="t", facts={}, measurements=[], test=test)
    assert "From 20 test images, 4 dimensions." in page.text
    assert "Nearest neighbours" not in page.text


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.full((40, 6), 0.1), "All features are equal"),
        (torch.zeros(40, 6), "All features are equal"),
        (random(40, 1), "40 test images, 1 dimensions"),
        (random(40, 1) @ random(1, 6), "Effective rank 1.0"),
        (random(40, 1).abs() @ random(1, 6).abs(), "Effective rank 1.0"),  # all point one way
        (2.0 ** torch.arange(40)[:, None] * random(1, 6), "Effective rank 1.0"),
        (1e30 * random(40, 6), "40 test images, 6 dimensions."),
        (random(3, 6), "3 test images, 6 dimensions."),
        (random(40, 6).half(), "40 test images, 6 dimensions."),
        (torch.cat([random(40, 5), torch.ones(40, 1)], 1), "1 of them constant"),
        (torch.cat([random(40, 6), torch.full((2, 6), torch.nan)]), "2 more were left out"),
        (torch.cat([random(40, 6), torch.full((1, 6), torch.inf)]), "1 more was left out"),
        (torch.full((40, 6), torch.nan), None),
        (random(1, 6), None),
        (random(40, 0), None),
        (random(0, 6), None),
    ],
)
def test_features_of_any_kind_are_reported(
    tmp_path: Path, features: Tensor, said: str | None
) -> None:
    labels = torch.arange(len(features)) % 3
    both = gallery(features, labels, list(photographs(5)))
    page = written(tmp_path, title="t", facts={}, measurements=[], train=both, test=both)
    page_of_test = written(tmp_path, title="t", facts={}, measurements=[], test=both)
    if said is None:
        assert "Spectrum" not in page.text
    else:
        assert said.replace("test images", "training images") in page.text
        assert said in page_of_test.text
    assert "nan" not in page.text


def test_map_marks_every_image_in_the_colour_of_its_class(tmp_path: Path) -> None:
    given = example() | {"predictions": None, "train": None}
    page = written(tmp_path, **given)
    figure = page.figure("map")
    marked = Counter(re.findall(r"style=\"fill: (#\w+)", figure))
    used = {colour: marked[colour] for colour in COLOURS[:4]}
    assert used == dict.fromkeys(COLOURS[:4], 15)
    legend = re.search(r'<ul class="legend".*?</ul>', page.html, re.DOTALL)
    assert legend is not None
    assert re.findall(r"<bdi>(.*?)</bdi>", legend[0]) == list(NAMES)
    assert "t-SNE of 60 images, by cosine similarity." in page.text


def test_map_keeps_the_classes_neighbourhoods(tmp_path: Path) -> None:
    labels = torch.arange(60) % 2
    test = gallery(random(60, 8) + 4 * (2 * labels[:, None] - 1), labels, [])
    page = written(tmp_path, title="t", facts={}, measurements=[], test=test)
    places = points(page.figure("map"))  # class by class
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(60)
    nearest = distances.argmin(1)
    assert ((nearest < 30) == (np.arange(60) < 30)).mean() > 0.95


def test_map_of_few_images_is_their_principal_components(tmp_path: Path) -> None:
    features = random(20, 6)
    test = gallery(features, None, [])
    page = written(tmp_path, title="t", facts={}, measurements=[], test=test)
    expected = PCA(2).fit_transform(torch.nn.functional.normalize(features).double().numpy())
    drawn = points(page.figure("map"))
    for axis in range(2):
        assert abs(np.corrcoef(drawn[:, axis], expected[:, axis])[0, 1]) > 1 - 1e-6
    assert "PCA of 20 images" in page.text
    assert 'class="legend"' not in page.html


@pytest.mark.parametrize(("num_classes", "shown"), [(20, True), (21, False)])
def test_legend_of_up_to_20_classes(tmp_path: Path, num_classes: int, shown: bool) -> None:
    given = example(num_classes, test_images=63) | {"predictions": None, "train": None}
    page = written(tmp_path, **given)
    assert ('class="legend"' in page.html) is shown
    assert ("several share a mark" in page.text) is not shown
    if shown:
        drawn = re.findall(r'<use xlink:href="([^"]*)"[^>]*style="fill: (#\w+)', page.figure("map"))
        assert len(set(drawn)) == 20
        marks = re.findall(r'fill: (#\w+)"><(circle|path d="[^"]*)', page.html)
        assert len(set(marks)) == 20


def test_map_draws_at_most_2000_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vicreg_hf.evaluation.charts._layout", lambda x, *_: x[:, :2])
    test = gallery(random(2100, 3), None, [])
    page = written(tmp_path, title="t", facts={}, measurements=[], test=test)
    assert len(points(page.figure("map"))) == 2000
    assert "2,000 images drawn from 2,100" in page.text


# --- nearest neighbours


def cases(page: Page) -> list[dict[str, Any]]:
    """What is written at each case: the query's lines, and those of its neighbours."""
    found = []
    for case in page.html.split('<div class="case">')[1:]:
        query, _, rest = case.partition('<ol class="near">')
        near = rest.partition("</ol>")[0].split("<li")[1:]
        clean = [re.sub(r"\s*<[^>]+>\s*", "|", f"<li{text}").split("|") for text in (query, *near)]
        lines = [[line.strip() for line in part if line.strip()] for part in clean]
        uris = re.findall(r'src="([^"]+)"', case.partition("</ol>")[0])
        found.append({"query": lines[0], "near": lines[1:], "uris": uris})
    return found


def shade(value: int) -> Tensor:
    return torch.full((3, 8, 8), value, dtype=torch.uint8)


def test_neighbours_are_the_nearest_and_marked_by_class(tmp_path: Path) -> None:
    given = example() | {"predictions": None}
    # an image says which row it is
    train = replace(given["train"], read=lambda rows: [shade(row) for row in rows])
    test = replace(given["test"], read=lambda rows: [shade(200 - row) for row in rows])
    page = written(tmp_path, **given | {"train": train, "test": test})
    unit = [g.features.numpy() / np.linalg.norm(g.features, axis=1)[:, None] for g in (train, test)]
    similarity = unit[1] @ unit[0].T
    assert train.labels is not None
    assert test.labels is not None
    kinds = re.findall(r"Where 20-NN is (right|wrong): (\d+) of 60", page.html)
    right = 0
    for row in range(60):
        order = np.argsort(-similarity[row])[:20]
        votes = np.zeros(4)
        np.add.at(votes, train.labels[order], np.exp(similarity[row, order] / 0.07))
        right += int(votes.argmax() == test.labels[row])
    assert kinds == [("right", str(right)), ("wrong", str(60 - right))]
    shown = cases(page)
    assert len(shown) == CASES + min(CASES, 60 - right)
    for place, case in enumerate(shown):
        values = [np.array(Image.open(io.BytesIO(decoded(uri))))[0, 0, 0] for uri in case["uris"]]
        row = 200 - int(values[0])
        nearest = np.argsort(-similarity[row])[:NEIGHBOURS]
        assert values[1:] == nearest.tolist()
        true = int(test.labels[row])
        assert case["near"] == [
            [("✓ " if same else "✗ ").strip(), NAMES[train.labels[index]],
             f"{similarity[row, index]:.2f}"]
            for index in nearest
            for same in [int(train.labels[index]) == true]
        ]  # fmt: skip
        mark = "✓" if place < CASES else "✗"
        assert case["query"][:2] == [NAMES[true], f"{mark} 20-NN:"]
        assert (case["query"][2] == NAMES[true]) is (mark == "✓")


@pytest.mark.parametrize("unlabelled", [("train",), ("test",), ("train", "test")])
def test_without_labels_neighbours_are_shown_unmarked(
    tmp_path: Path, unlabelled: tuple[str, ...]
) -> None:
    given = example() | {"predictions": None, "labels": None}
    for split in unlabelled:
        given[split] = replace(given[split], labels=None)
    page = written(tmp_path, **given)
    assert "Nearest neighbours" in page.text
    assert "Where" not in page.text
    assert "✓" not in page.html
    assert len(cases(page)) == CASES
    named = all(near[0] in NAMES for case in cases(page) for near in case["near"])
    assert named is ("train" not in unlabelled)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), (8, 8)), ((2, 30, 20), (20, 30)), ((3, 200, 400), (96, 48)),
        ((4, 96, 96), (96, 96)), ((9, 1, 500), (96, 1)),
    ],
)  # fmt: skip
def test_images_of_any_shape_become_small_thumbnails(
    tmp_path: Path, shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    image = torch.full(shape, 255, dtype=torch.uint8)
    image[0] = 90
    both = gallery(random(8, 4), None, [image])
    page = written(tmp_path, title="t", facts={}, measurements=[], train=both, test=both)
    opened = Image.open(io.BytesIO(decoded(page.values("img", "src")[0])))
    assert opened.size == size
    expected = (90, 255, 255) if shape[0] >= 3 else (90, 90, 90)
    assert opened.convert("RGB").getpixel((0, 0)) == expected


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
