"""The report's figures of features: spectrum and map."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reports import NAMES, example, gallery, random, undrawn, written
from sklearn.decomposition import PCA
from torch import Tensor

from vicreg_hf.evaluation.report.charts import COLOURS, feature_map


def points(svg: str) -> NDArray[np.float64]:
    """Places (n, 2) of a figure's marks, y upwards."""
    found = re.findall(r'<use xlink:href="[^"]*" x="([\d.-]+)" y="([\d.-]+)" style="fill', svg)
    return np.array(found, dtype=np.float64) * [1, -1]


def test_spectrum_is_that_of_the_centred_training_features(tmp_path: Path) -> None:
    features = random(300, 8) @ torch.diag(torch.logspace(0, -3, 8)) @ random(8, 9, seed=1) + 5
    page = written(tmp_path, train=gallery(features))
    centred = features.double().numpy() - features.double().numpy().mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    # the marks of the curve, without the ticks of the axes
    curve = re.search(r'clip-path="[^"]*">\s*(<use.*?)</g>', page.figure("spectrum"), re.DOTALL)
    assert curve is not None
    marks = points(curve[1])
    assert len(marks) == 8  # of the ninth only rounding is left
    assert np.corrcoef(marks[:, 1], np.log(singular[:8]))[0, 1] > 1 - 1e-9
    p = singular / singular.sum()
    rank = np.exp(-(p * np.log(p)).sum())
    assert f"Effective rank of the centred training features {rank:.1f} of at most 9" in page.text
    assert "From 300 training images, 9 dimensions." in page.text
    std = centred.std(0, ddof=1)
    [described] = [a for a in page.values("svg", "aria-label") if "deviation" in a]
    assert f"9 dimensions, from {std.min():.2g} to {std.max():.2g}" in described
    [described] = [a for a in page.values("svg", "aria-label") if "correlation" in a]
    off_diagonal = np.corrcoef(centred.T)[np.triu_indices(9, k=1)]
    assert f"36 pairs, from {off_diagonal.min():.2g} to {off_diagonal.max():.2g}" in described


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.full((20, 6), 0.1), "All features are equal"),
        (
            random(20, 1).abs() @ random(1, 6).abs(),
            "Effective rank of the centred training features 1.0",
        ),  # all point one way
        (1e30 * random(20, 6), "20 training images, 6 dimensions."),
        (torch.cat([random(20, 5), torch.ones(20, 1)], 1), "1 of them constant"),
        (torch.cat([random(20, 6), torch.full((2, 6), torch.nan)]), "2 more were left out"),
        (torch.full((20, 6), torch.nan), None),
        (random(1, 6), None),
        (random(0, 6), None),
    ],
)
def test_any_features_are_reported(tmp_path: Path, features: Tensor, said: str | None) -> None:
    both = gallery(features, torch.arange(len(features)) % 3, [torch.zeros(3, 4, 4).byte()])
    page = written(tmp_path, train=both, test=both, class_names=NAMES)
    assert ("Spectrum" in page.text) is (said is not None)
    assert (said or "") in page.text
    assert "nan" not in page.text
    curve = re.search(r"Singular values of the centred features, (\d+) of them", page.html)
    assert curve is None or int(curve[1]) > 1  # one point is no curve


def test_map_marks_every_image_in_the_colour_of_its_class(tmp_path: Path) -> None:
    page = written(tmp_path, **example() | {"predictions": {}, "train": undrawn()})
    marked = Counter(re.findall(r"style=\"fill: (#\w+)", page.figure("map")))
    assert {colour: marked[colour] for colour in COLOURS[:4]} == dict.fromkeys(COLOURS[:4], 15)
    legend = re.search(r'<ul class="legend".*?</ul>', page.html, re.DOTALL)
    assert legend is not None
    assert re.findall(r"<bdi>(.*?)</bdi>", legend[0]) == list(NAMES)
    assert "t-SNE of 60 images, by cosine similarity." in page.text


def test_map_keeps_the_classes_neighbourhoods() -> None:
    labels = torch.arange(60) % 2
    found = feature_map(gallery(random(60, 8) + 4 * (2 * labels[:, None] - 1), labels), seed=0)
    assert found is not None
    places = points(found["figure"])  # class by class
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(60)
    nearest = distances.argmin(1)
    assert ((nearest < 30) == (np.arange(60) < 30)).mean() > 0.95


def test_map_of_few_images_is_their_principal_components(tmp_path: Path) -> None:
    features = random(20, 6)
    page = written(tmp_path, test=gallery(features))
    expected = PCA(2).fit_transform(torch.nn.functional.normalize(features).double().numpy())
    drawn = points(page.figure("map"))
    for axis in range(2):
        assert abs(np.corrcoef(drawn[:, axis], expected[:, axis])[0, 1]) > 1 - 1e-6
    assert "PCA of 20 images" in page.text
    assert 'class="legend"' not in page.html


@pytest.mark.parametrize(("num_classes", "shown"), [(20, True), (21, False)])
def test_legend_of_up_to_20_classes(tmp_path: Path, num_classes: int, shown: bool) -> None:
    test = gallery(random(29, 4), torch.arange(29) % num_classes)
    page = written(tmp_path, test=test, class_names=[f"c{k}" for k in range(num_classes)])
    marks = set(re.findall(r'fill: (#\w+)"><(circle|path d="[^"]*)', page.html))
    assert len(marks) == (20 if shown else 0)
    assert ('class="legend"' in page.html) is shown
    assert ("several share a mark" in page.text) is not shown


def test_map_draws_at_most_2000_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vicreg_hf.evaluation.report.charts._layout", lambda x, *_: x[:, :2])
    page = written(tmp_path, test=gallery(random(2100, 3)))
    assert len(points(page.figure("map"))) == 2000
    assert "2,000 images drawn from 2,100" in page.text
