"""The report's pictures of features: spectrum, map and nearest neighbours."""

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
    NAMES,
    Page,
    decoded,
    example,
    gallery,
    random,
    written,
)
from sklearn.decomposition import PCA
from torch import Tensor

from vicreg_hf.evaluation.report.charts import COLOURS
from vicreg_hf.evaluation.report.neighbours import CASES, NEIGHBOURS

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
    monkeypatch.setattr("vicreg_hf.evaluation.report.charts._layout", lambda x, *_: x[:, :2])
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
