"""The first line of a report, and encoders side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reports import Page, example, gallery, random, written

from vicreg_hf.evaluation.measurements import Baseline, Measurement, scored
from vicreg_hf.evaluation.report.verdict import Evaluated, verdict

LABELS = torch.arange(400) % 4


def classified(share: float) -> torch.Tensor:
    """Classes of which the first part is right."""
    return torch.where(torch.arange(400) < share * 400, LABELS, (LABELS + 1) % 4)


def evaluated(name: str, share: float, **baselines: float) -> Evaluated:
    k = {"k": 20}
    head = scored("knn", "20-NN top-1 accuracy", classified(share) == LABELS, 0, k)
    others = {
        other: Baseline(scored("knn", other, classified(s) == LABELS, 0, k), classified(s))
        for other, s in baselines.items()
    }
    test = gallery(random(400, 4), LABELS, [torch.zeros(3, 4, 4).byte()])
    return Evaluated(name, [head], {"20-NN": classified(share)}, test, test, others)


def test_the_first_line_is_one_number_and_what_it_beats() -> None:
    given = {"raw pixels": 0.5, "untrained": 0.895}
    first, second = verdict([evaluated("r18", 0.9, **given)])
    assert first == (
        "r18: 90.0 % (86.7 to 92.6) of 400 held-out images recognised by their 20 nearest "
        "neighbours; raw pixels 50.0 %, untrained 89.5 %."
    )
    assert second == (
        "It is better than raw pixels, but not told apart from the untrained encoder on these "
        "images."
    )
    assert verdict([evaluated("r18", 0.4, untrained=0.5)])[1].startswith("It is worse than the")
    best, compared = verdict([evaluated("a", 0.4), evaluated("b", 1.0)])
    assert best.startswith("b: 100.0 % (99.0 to 100.0) of 400")
    assert best.endswith("; a 40.0 % (35.3 to 44.9).")
    assert compared == "b is better than a on these images."


def test_without_a_share_the_first_line_says_so() -> None:
    rank = Measurement("collapse", "effective rank of features", 3.2, 60, 0, percent=False)
    both = gallery(random(60, 4))
    (line,) = verdict([Evaluated("r18", [rank], {}, both, both)])
    assert line.startswith("r18: effective rank of features 3.2 of at most 4 on 60 held-out")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    models = [evaluated("a", 0.9, untrained=0.3), evaluated("<b>", 0.8)]
    return written(tmp_path_factory.mktemp("several"), **example(), models=models)


def test_encoders_stand_side_by_side(page: Page) -> None:
    assert page.html.index("a: 90.0 % (86.7 to 92.6)") < page.html.index("<nav")
    assert page.tables["measurements"] == [
        ["Measure", "a", "<b>", "Test images", "Settings"],
        ["20-NN top-1 accuracy", "90.00 % (86.67 to 92.57)", "80.00 % (75.80 to 83.63)", "400",
         "k 20, seed 0"],
    ]  # fmt: skip
    assert page.tables["differences"][1][0] == "a, 20-NN over <b>, 20-NN"
    for name in ("spectrum", "m1-spectrum", "map", "m1-map"):
        assert page.figure(name)
    ids = page.values("section", "id")
    assert ids == ["neighbours", "map", "classes", "confusions", "spectrum", "results", "facts"]
    # of each query there is a row of neighbours for each encoder
    assert page.html.count('<ol class="near">') == 2 * page.html.count('<div class="query">')


def test_tables_are_folded_below_the_pictures(page: Page, tmp_path: Path) -> None:
    for html in (page.html, written(tmp_path, **example()).html):
        outside = "".join(
            part.partition("</details>")[2] or part for part in html.split("<details>")
        )
        assert '<table class="list"' not in outside
        assert html.index('id="neighbours"') < html.index('id="measurements"')
