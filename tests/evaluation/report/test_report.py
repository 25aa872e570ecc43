"""The report's page: its results, and what holds for all of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reports import HOSTILE, MEASUREMENTS, Page, example, undrawn, written

from vicreg_hf.evaluation.measurements import Measurement


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("report"), **example())


def test_measurements_stand_in_a_table(tmp_path: Path) -> None:
    none = Measurement("knn", "none", 0.0, 50, 0, low=0.0, high=0.0)
    page = written(tmp_path, measurements=[*MEASUREMENTS, none], title="a \ud83d b")
    assert "a ? b" in page.lines  # half a surrogate pair does not cost the report
    assert page.tables["measurements"][1:] == [
        ["20-NN top-1 accuracy", "81.25 % (79.00 to 83.00)", "1,234",
         "k 20, temperature 0.07, seed 3"],
        ["effective rank of features", "37.22", "60", "seed 0"],
        ["none", "0.00 % (0.00 to 0.00)", "50", "seed 0"],
    ]  # fmt: skip
    assert "interval over the choice of test images" in page.text
    assert "interval" not in written(tmp_path, measurements=MEASUREMENTS[1:]).text


def test_a_section_that_cannot_be_made_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vicreg_hf.evaluation.report.charts.TSNE", None)
    page = written(tmp_path, **example())
    assert "warning: the report is without its section map: TypeError: " in capsys.readouterr().err
    assert 'id="map"' not in page.html


def test_differences_are_those_over_the_same_resampled_images(tmp_path: Path) -> None:
    given = example(test_images=400, drawn=False)
    labels, predictions = given["test"].labels, given["predictions"]
    predictions["linear again"] = predictions["linear"].clone()
    rows = written(tmp_path, **given).tables["differences"][1:]
    assert [row[0] for row in rows] == [
        "linear over linear again", "linear over 20-NN", "linear again over 20-NN",
    ]  # fmt: skip
    assert rows[0][1:] == ["+0.00 (+0.00 to +0.00)", "within noise"]
    right = [(predictions[name] == labels).double().numpy() for name in ("linear", "20-NN")]
    difference = right[0] - right[1]
    drawn = difference[np.random.default_rng(99).integers(400, size=(4000, 400))].mean(1)
    shown = [float(number) for number in re.findall(r"[+-][\d.]+", rows[1][1])]
    assert shown[0] == pytest.approx(100 * difference.mean(), abs=0.005)
    # one image is 0.25 points, and both ends are estimates
    assert shown[1:] == pytest.approx(100 * np.quantile(drawn, [0.025, 0.975]), abs=0.6)
    assert rows[1][2] == "beyond noise"
    one, other, wrong = labels.clone(), labels.clone(), (labels + 1) % 4
    one[:3], other[3:7] = wrong[:3], wrong[3:7]
    given["predictions"] = {"a": one, "b": other}
    (row,) = written(tmp_path, **given).tables["differences"][1:]
    assert (row[0], row[2]) == ("a over b", "within noise")
    assert row[1].startswith("+0.25 (-")


def test_sections_without_content_are_left_out(tmp_path: Path, page: Page) -> None:
    sections = ("neighbours", "map", "classes", "confusions", "spectrum", "results", "facts")
    few = example(test_images=12)
    for found, absent in (
        (page, set()),
        (written(tmp_path, **few | {"predictions": {}}), {"classes", "confusions"}),
        (written(tmp_path, **few | {"train": undrawn()}), {"spectrum", "neighbours"}),
        (written(tmp_path, **few | {"test": undrawn()}),
         {"classes", "confusions", "map", "neighbours"}),
    ):  # fmt: skip
        expected = [section for section in sections if section not in absent]
        assert found.values("section", "id") == expected
        assert [link.removeprefix("#") for link in found.values("a", "href")] == expected


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    given = example(test_images=12) | {"class_names": HOSTILE, "title": HOSTILE[0]}
    given["facts"] = {HOSTILE[0]: HOSTILE[1]}
    given["measurements"] = [replace(MEASUREMENTS[0], name=HOSTILE[1], settings={"k": HOSTILE[0]})]
    given["predictions"] = dict.fromkeys(HOSTILE[:2], given["test"].labels)
    page = written(tmp_path, **given)
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [name for _, own in page.elements for name in own if name.startswith("on")]
    assert all(uri.startswith("data:image/") for uri in page.values("img", "src"))
    assert page.lines.count(HOSTILE[0]) > 5
    assert HOSTILE[2] in page.lines
    assert page.tables["measurements"][1][0] == HOSTILE[1]


def test_the_page_refers_to_nothing_outside_it_and_describes_its_pictures(page: Page) -> None:
    linking = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    references = [own[name] or "" for _, own in page.elements for name in linking if name in own]
    assert len(references) > 80
    assert [value for value in references if not value.startswith(("#", "data:"))] == []
    assert re.findall(r"url\((?!#)", page.html) == []
    assert "http" not in page.html
    assert "@import" not in page.html
    ids = [own["id"] for _, own in page.elements if "id" in own]
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:href="|url\()#([^")]+)', page.html)
    assert len(named) > 60
    assert set(named) <= set(ids)
    images = [own for tag, own in page.elements if tag == "img"]
    assert len(images) > 50
    assert all(own.get("alt") for own in images)
    figures = [own for tag, own in page.elements if tag == "svg" and "role" in own]
    assert len(figures) == 4
    assert all(own["role"] == "img" and own["aria-label"] for own in figures)


def test_the_same_input_gives_the_same_file(tmp_path: Path, page: Page) -> None:
    assert written(tmp_path, **example()).html == page.html
    assert written(tmp_path, **example(), seed=1).html != page.html
