"""The report of an encoder's evaluation: one HTML file that needs no server, network or script.

Shapes: M test images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.evaluation.report.charts import COLOURS, MARKERS, feature_map, spectrum
from vicreg_hf.evaluation.report.gallery import Gallery, as_png
from vicreg_hf.evaluation.report.neighbours import neighbours
from vicreg_hf.metrics.intervals import bootstrap_interval, wilson_interval

TEMPLATE = "report.html.jinja"
MAX_BARS = 50
"""Classes up to which all are shown; of more, the worst and the best."""
WORST, BEST = 20, 10
MAX_NUMBERED = 15
"""Classes up to which the confusion matrix holds numbers."""
MAX_MATRIX = 1000
"""Classes above which no confusion matrix is drawn."""
PAIRS = 10
SHADE = (0, 114, 178)
"""Of a cell of the confusion matrix, in Okabe and Ito's blue."""

__all__ = ["Gallery", "write_report"]


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    measurements: Sequence[Measurement],
    predictions: Mapping[str, Tensor] | None = None,
    labels: Tensor | None = None,
    class_names: Sequence[str] = (),
    train: Gallery | None = None,
    test: Gallery | None = None,
    seed: int = 0,
) -> Path:
    """Write what an encoder's evaluation found. Parts whose input is missing are left out.

    The same input gives the same file.

    Args:
        path: of the HTML file; its folder is made if absent.
        title: such as "vicreg-r50 on cifar10".
        facts: model, data set, preprocessing, hardware and the like, by name.
        predictions: (M,) classes by name of the classifier, such as "20-NN".
        labels: (M,) classes from 0; those of `test` are taken if absent, and the other way round.
        class_names: "class 7" stands for one that is missing.
        train: whose spectrum is drawn, and among which neighbours are looked for.
        test: of which a map is drawn, and whose images are looked up.
        seed: of what is drawn at random.

    Returns:
        The path.

    Raises:
        ValueError: numbers of features, labels and predictions that differ, or negative classes.
    """
    path = Path(path)
    if labels is None and test is not None:
        labels = test.labels
    truth = None if labels is None else _integers("labels", labels)
    predicted = {name: _integers(name, rows) for name, rows in (predictions or {}).items()}
    for name, rows in predicted.items():
        if truth is not None and len(rows) != len(truth):
            raise ValueError(
                f"every test image needs one prediction, got {len(rows)} of {name} and "
                f"{len(truth)} labels."
            )
    of_test, of_train = _gallery_labels("test", test, truth), _gallery_labels("train", train, None)
    given = [rows for rows in (*predicted.values(), truth, of_test, of_train) if rows is not None]
    names = _names(class_names, 1 + max((int(rows.max(initial=-1)) for rows in given), default=-1))
    page: dict[str, Any] = dict.fromkeys(("classes", "spectrum", "map", "neighbours"))
    page["results"] = _results(measurements, predicted, truth, seed)
    if truth is not None and len(truth) and predicted:
        page["classes"] = _of_classes(predicted, truth, names)
    if train is not None or test is not None:
        split, gallery = ("test", test) if train is None else ("training", train)
        assert gallery is not None
        page["spectrum"] = spectrum(gallery, split, seed=seed)
    if test is not None:
        page["map"] = feature_map(test, of_test, seed=seed)
    if train is not None and test is not None:
        page["neighbours"] = neighbours(train, test, of_test, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = _template().render(title=title, facts=facts, names=names, **page)
    # half of a surrogate pair, which no encoding has, must not cost the report
    path.write_text(html, encoding="utf-8", errors="replace", newline="\n")
    return path


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        colours=COLOURS, num_markers=len(MARKERS), num_worst=WORST, num_best=BEST
    )
    return environment.get_template(TEMPLATE)


# --- input
def _integers(name: str, classes: Tensor) -> NDArray[np.int64]:
    rows = classes.cpu().numpy()
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows < 0).any():
        raise ValueError(
            f"{name} must be one class from 0 for each image, got {rows.dtype} of shape "
            f"{rows.shape}, the least {rows.min(initial=0)}."
        )
    return rows.astype(np.int64)


def _gallery_labels(
    name: str, gallery: Gallery | None, others: NDArray[np.int64] | None
) -> NDArray[np.int64] | None:
    """The classes of a gallery's images, one for each."""
    if gallery is None:
        return None
    if gallery.features.ndim != 2:
        raise ValueError(
            f"features of {name} must be (n, F), got shape {tuple(gallery.features.shape)}."
        )
    labels = others if gallery.labels is None else _integers(f"{name}.labels", gallery.labels)
    if labels is not None and len(labels) != len(gallery.features):
        raise ValueError(
            f"every row of {name}.features needs one label, got {len(gallery.features)} rows and "
            f"{len(labels)} labels."
        )
    return labels


def _names(given: Sequence[str], count: int) -> list[str]:
    """One for every class, though some were not given."""
    named = {index: name for index, name in enumerate(given) if name.strip()}
    return [named.get(index, f"class {index}") for index in range(max(count, len(given)))]


# --- results
def _results(
    measurements: Sequence[Measurement],
    predicted: Mapping[str, NDArray[np.int64]],
    truth: NDArray[np.int64] | None,
    seed: int,
) -> dict[str, Any] | None:
    rows = []
    for measured in measurements:
        value, opening, interval = measured.shown.partition("(")
        rows.append(
            {
                "name": measured.name, "value": value.strip(), "interval": opening + interval,
                "images": measured.num_images, "settings": _in_short(measured),
            }
        )  # fmt: skip
    differences = [] if truth is None else _differences(predicted, truth, seed)
    if not rows and not differences:
        return None
    intervals = any(m.low is not None and m.high is not None for m in measurements)
    return {"rows": rows, "differences": differences, "intervals": intervals}


def _in_short(measurement: Measurement) -> str:
    given = {**measurement.settings, "seed": measurement.seed}
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in given.items()
    )


def _differences(
    predicted: Mapping[str, NDArray[np.int64]], truth: NDArray[np.int64], seed: int
) -> list[dict[str, Any]]:
    """Between every two classifiers, the better one first, over the same resampled images."""
    if not len(truth):
        return []
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


# --- classes
def _of_classes(
    predicted: Mapping[str, NDArray[np.int64]], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    """What the most accurate classifier makes of each class."""
    best = max(predicted, key=lambda name: (predicted[name] == truth).mean())
    return {
        "classifier": best,
        "of": len(predicted),
        **_accuracies(predicted[best], truth, names),
        "pairs": _confused_pairs(predicted[best], truth, names),
        "matrix": _matrix(predicted[best], truth, names),
    }


def _accuracies(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    images = np.bincount(truth, minlength=len(names))
    right = np.bincount(truth[predicted == truth], minlength=len(names))
    tested = np.flatnonzero(images)
    order = tested[np.argsort(right[tested] / images[tested], kind="stable")].tolist()
    left_out = len(order) - WORST - BEST if len(order) > MAX_BARS else 0
    bars = []
    for index in order[:WORST] + order[-BEST:] if left_out else order:
        low, high = wilson_interval(int(right[index]), int(images[index]))
        bars.append(
            {
                "name": names[index], "images": int(images[index]),
                "share": float(right[index] / images[index]), "low": low, "high": high,
            }
        )  # fmt: skip
    return {"bars": bars, "left_out": left_out, "untested": len(names) - len(tested)}


def _confused_pairs(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> list[dict[str, Any]]:
    wrong = predicted != truth
    codes, counts = np.unique(truth[wrong] * len(names) + predicted[wrong], return_counts=True)
    images = np.bincount(truth, minlength=len(names))
    pairs = []
    for place in np.argsort(-counts, kind="stable")[:PAIRS]:
        true, taken = divmod(int(codes[place]), len(names))
        pairs.append(
            {
                "true": names[true], "predicted": names[taken], "count": int(counts[place]),
                "images": int(images[true]),
            }
        )  # fmt: skip
    return pairs


def _matrix(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any] | None:
    """Shares by true class, as cells of a table or as a picture; of the classes that occur."""
    classes, places = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    count = len(classes)
    if count > MAX_MATRIX:
        return None
    codes = places[: len(truth)] * count + places[len(truth) :]
    matrix = np.bincount(codes, minlength=count**2).reshape(count, count)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    shown = [names[index] for index in classes]
    if count <= MAX_NUMBERED:
        images = matrix.sum(1).tolist()
        return {"names": shown, "images": images, "shares": shares.tolist(), "picture": None}
    # one colour, the more opaque the larger the share, looks right on light and on dark
    picture = Image.fromarray((255 * np.sqrt(shares)).round().astype(np.uint8))
    picture.putpalette(SHADE * 256)
    return {"names": shown, "picture": as_png(picture, transparency=bytes(range(256)))}
