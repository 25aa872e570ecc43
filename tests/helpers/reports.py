"""A report, and its page as a test reads it."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from pictures import photographs
from torch import Tensor

from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.evaluation.report.gallery import Gallery
from vicreg_hf.evaluation.report.report import write_report
from vicreg_hf.evaluation.report.verdict import Evaluated

NAMES = ("cat", "dog", "ship", "truck")
HOSTILE = (
    "<script>window.pwned = 1</script>", '"><img src=x onerror="window.pwned = 1">',
    "$\\frac{a$ & {{ 7 * 6 }}", "x" * 200,
)  # fmt: skip
FACTS = {"model": "runs/<i>a</i>", "command": "evaluate.py --model " + "y" * 150}
MEASUREMENTS = (
    Measurement(
        "knn", "20-NN top-1 accuracy", 0.8125, 1234, 3, {"k": 20, "temperature": 0.07}, 0.79, 0.83
    ),
    Measurement("collapse", "effective rank of features", 37.2231, 60, 0, percent=False),
)


class Page(HTMLParser):
    """A page that is read: tables by id, text, and every element's attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.lines: list[str] = []
        self._cells: list[list[str]] | None = None
        self._hidden = False
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._hidden = tag in ("style", "script")
        if tag == "table":
            self._cells = self.tables.setdefault(
                attributes.get("id") or attributes["class"] or "", []
            )
        elif tag == "tr" and self._cells is not None:
            self._cells.append([])
        elif tag in ("td", "th") and self._cells:
            self._cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        if tag == "table" and self._cells is not None:
            self._cells[:] = [[cell.strip() for cell in row] for row in self._cells]
            self._cells = None

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if data.strip():
            self.lines.append(" ".join(data.split()))
        if self._cells and self._cells[-1]:
            self._cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.lines)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [own[attribute] or "" for name, own in self.elements
                if name == tag and attribute in own]  # fmt: skip

    def figure(self, name: str) -> str:
        """An inline figure by the name before its ids."""
        found = [svg for svg in re.findall(r"<svg role.*?</svg>", self.html, re.DOTALL)
                 if f'id="{name}-' in svg]  # fmt: skip
        assert len(found) == 1
        return found[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gallery(features: Tensor, labels: Tensor | None = None, images: Any = ()) -> Gallery:
    return Gallery(features, labels, lambda rows: [images[row % len(images)] for row in rows])


def undrawn(labels: Tensor | None = None) -> Gallery:
    """Features that are not finite, of which nothing is drawn."""
    return gallery(torch.full((1 if labels is None else len(labels), 1), torch.nan), labels)


def example(num_classes: int = 4, *, test_images: int = 60, drawn: bool = True) -> dict[str, Any]:
    """Features that lie about their class's centre, and two classifiers of different accuracy."""
    labels = torch.arange(test_images) % num_classes
    noise = torch.rand(2, test_images, generator=torch.Generator().manual_seed(2))
    wrong = (labels + 1 + (noise[1] * 3).long() // 2) % num_classes
    train, test = undrawn(), undrawn(labels)
    if drawn:
        images = list(photographs(24))
        centres = 1.2 * random(num_classes, 12, seed=1)
        of_train = torch.arange(120) % num_classes
        train = gallery(centres[of_train] + random(120, 12), of_train, images)
        test = gallery(centres[labels] + random(test_images, 12, seed=3), labels, images)
    return {
        "title": "vicreg-r18 on pictures", "facts": FACTS, "measurements": MEASUREMENTS,
        "predictions": {
            "20-NN": torch.where(noise[0] < 0.75, labels, wrong),
            "linear": torch.where(noise[1] < 0.9, labels, wrong),
        },
        "class_names": [*NAMES, *(f"class {k}" for k in range(4, num_classes))],
        "train": train, "test": test,
    }  # fmt: skip


def written(directory: Path, **changes: Any) -> Page:
    """The page of an undrawn example without classifiers, but for some changes."""
    plain = example(drawn=False) | {"predictions": {}, "test": undrawn()}
    write(directory / "report.html", **plain | changes)
    return Page(directory / "report.html")


def write(path: Path, **given: Any) -> None:
    """Write the report of one encoder, whose parts are given beside what holds for the page."""
    parts = ("measurements", "predictions", "train", "test", "baselines", "maps")
    own = {name: given.pop(name) for name in parts if name in given}
    given.setdefault("models", [Evaluated("vicreg-r18", **own)])
    write_report(path, **given)


def decoded(uri: str) -> bytes:
    """The picture in a data URI."""
    return base64.b64decode(uri.partition("base64,")[2], validate=True)
