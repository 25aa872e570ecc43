"""The report of an evaluation: one HTML file that needs no server, network or script.

Shapes: M test images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vicreg_hf.evaluation.report.charts import COLOURS, MARKERS, feature_map, spectrum
from vicreg_hf.evaluation.report.classes import BEST, WORST, classes
from vicreg_hf.evaluation.report.gallery import STYLES
from vicreg_hf.evaluation.report.maps import pictures_of_maps
from vicreg_hf.evaluation.report.neighbours import neighbours
from vicreg_hf.evaluation.report.segmentation import segmentation
from vicreg_hf.evaluation.report.verdict import (
    UNTRAINED,
    Evaluated,
    differences,
    right_answers,
    verdict,
)
from vicreg_hf.features.maps import MATCHES
from vicreg_hf.metrics.intervals import RESAMPLES
from vicreg_hf.runtime.console import optional

TEMPLATE = "report.html.jinja"
RESAMPLED = {"svm": "the SVM", "segmentation": "segmentation"}
"""Protocols whose intervals are over resampled images, in the words of the page."""
SECTIONS = ("neighbours", "map", "classes", "segmentation", "maps", "spectrum")
"""Parts of the page that there are of each encoder."""


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    models: Sequence[Evaluated],
    class_names: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write what an evaluation found, without sections that are empty or cannot be made.

    The same input gives the same file.

    Args:
        path: of the HTML file.
        title: such as "vicreg-r50 on cifar10".
        facts: model, data set, preprocessing, hardware and the like, by name.
        models: the encoders, measured on the same test images.
        class_names: those of all classes; a blank one is shown as "class 7".
        seed: seed of every random choice.
        resamples: of the test images, for the intervals of differences.
    """
    names = [name if name.strip() else f"class {k}" for k, name in enumerate(class_names)]
    drawn = {"seed": seed, "resamples": resamples}
    common: dict[str, Any] = {"differences": [], "verdict": []}
    with optional("the report is without its first line"):
        common["verdict"] = verdict(models, **drawn)
    with optional("the report is without its section differences"):
        common["differences"] = differences(right_answers(models), **drawn)
    shown = [
        _sections(model, names, seed, place, alone=len(models) == 1)
        for place, model in enumerate(models)
    ]
    html = _template().render(
        title=title, facts=facts, names=names, models=shown, standing=_standing(models),
        parts={part for one in shown for part in SECTIONS if one[part]},
        table=_side_by_side(models), **common,
    )  # fmt: skip
    # half of a surrogate pair, which no encoding has, must not cost the report
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")


def _sections(
    model: Evaluated, names: Sequence[str], seed: int, place: int, *, alone: bool
) -> dict[str, Any]:
    """The contents of the page's pictures of one encoder."""
    train, test, prefix = model.train, model.test, f"m{place}-" if place else ""
    predicted = {name: rows.numpy() for name, rows in model.predictions.items()}
    makers: dict[str, Callable[[], Any]] = {
        "neighbours": lambda: neighbours(train, test, seed=seed, grouped=alone),
        "map": lambda: feature_map(test, seed=seed, prefix=prefix),
        "spectrum": lambda: spectrum(train, seed=seed, prefix=prefix),
    }
    if test.labels is not None:
        truth = test.labels.numpy()
        makers["classes"] = lambda: classes(predicted, truth, names)
    if (segmented := model.segmented) is not None:
        makers["segmentation"] = lambda: segmentation(segmented)
    if (shown := model.maps) is not None:
        makers["maps"] = lambda: pictures_of_maps(shown)
    found: dict[str, Any] = {"name": model.name} | dict.fromkeys(SECTIONS)
    for section, make in makers.items():
        with optional(f"the report is without its section {section}"):
            found[section] = make()
    return found


def _standing(models: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Bars of the number in the first line, of each encoder and of what it is compared with."""
    bars: list[dict[str, Any]] = []
    several = len(models) > 1
    for model in sorted(models, key=lambda m: -m.headline.value if m.headline else 0.0):
        if (head := model.headline) is None or head.low is None:
            continue
        others = {
            f"{model.name}, {name}" if several and name == UNTRAINED else name: b.measurement
            for name, b in model.baselines.items() if name == UNTRAINED or not bars
        }  # fmt: skip
        for place, (name, m) in enumerate([(model.name, head), *others.items()]):
            bars.append(
                {
                    "name": name, "images": m.num_images, "share": m.value, "low": m.low,
                    "high": m.high, "baseline": place > 0, "measure": head.name,
                    "resampled": head.protocol in RESAMPLED,
                }
            )  # fmt: skip
    return bars


def _side_by_side(models: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """A row for each measure: its settings, and its value for each encoder that has one."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        for m in model.measurements:
            row = found.setdefault(m.name, {"first": m, "values": {}, "interval": False})
            row["interval"] |= m.low is not None
            row["values"][model.name] = m
    return list(found.values())


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(STYLES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        colours=COLOURS, resampled=RESAMPLED, num_markers=len(MARKERS), num_worst=WORST,
        num_best=BEST, num_matches=MATCHES,
    )  # fmt: skip
    return environment.get_template(TEMPLATE)
