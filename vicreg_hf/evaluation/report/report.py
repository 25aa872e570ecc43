"""The report of an encoder's evaluation: one HTML file that needs no server, network or script.

Shapes: M test images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.evaluation.report.charts import COLOURS, MARKERS, feature_map, spectrum
from vicreg_hf.evaluation.report.classes import BEST, WORST, classes
from vicreg_hf.evaluation.report.gallery import Gallery
from vicreg_hf.evaluation.report.neighbours import neighbours
from vicreg_hf.metrics.intervals import bootstrap_interval
from vicreg_hf.runtime.console import optional

TEMPLATE = "report.html.jinja"


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    measurements: Sequence[Measurement],
    predictions: Mapping[str, Tensor],
    class_names: Sequence[str],
    train: Gallery,
    test: Gallery,
    seed: int = 0,
) -> None:
    """Write what an encoder's evaluation found, without sections that are empty or cannot be made.

    The same input gives the same file.

    Args:
        path: of the HTML file.
        title: such as "vicreg-r50 on cifar10".
        facts: model, data set, preprocessing, hardware and the like, by name.
        predictions: (M,) classes of the test images, by name of the classifier such as "20-NN".
        class_names: those of all classes; a blank one is shown as "class 7".
        train: images whose spectrum is shown, and which are searched for neighbours.
        test: images that are mapped and looked up.
        seed: seed of every random choice.
    """
    truth = None if test.labels is None else test.labels.numpy()
    predicted = {name: rows.numpy() for name, rows in predictions.items()}
    names = [name if name.strip() else f"class {k}" for k, name in enumerate(class_names)]
    makers: dict[str, Callable[[], Any]] = {
        "spectrum": lambda: spectrum(train, seed=seed),
        "map": lambda: feature_map(test, seed=seed),
        "neighbours": lambda: neighbours(train, test, seed=seed),
    }
    if truth is not None:
        makers["differences"] = lambda: _differences(predicted, truth, seed)
        makers["classes"] = lambda: classes(predicted, truth, names)
    sections: dict[str, Any] = {"differences": [], "classes": None}
    for section, make in makers.items():
        sections[section] = None
        with optional(f"the report is without its section {section}"):
            sections[section] = make()
    html = _template().render(
        title=title, facts=facts, names=names, measurements=measurements, **sections
    )
    # half of a surrogate pair, which no encoding has, must not cost the report
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        colours=COLOURS, num_markers=len(MARKERS), num_worst=WORST, num_best=BEST
    )
    return environment.get_template(TEMPLATE)


def _differences(
    predicted: Mapping[str, NDArray[np.int64]], truth: NDArray[np.int64], seed: int
) -> list[dict[str, Any]]:
    """Between every two classifiers, the better one first, over the same resampled images."""
    right = {name: (rows == truth).astype(np.float64) for name, rows in predicted.items()}
    order = sorted(right, key=lambda name: -right[name].mean())
    found = []
    for better, worse in combinations(order, 2):
        differences = right[better] - right[worse]
        low, high = bootstrap_interval(differences, seed=seed)
        found.append(
            {
                "better": better, "worse": worse, "points": 100 * float(differences.mean()),
                "low": 100 * low, "high": 100 * high, "noise": low <= 0 <= high,
            }
        )  # fmt: skip
    return found
