"""Figures of features: their spectrum, and a map of them.

Figures hold no text from outside: names of classes stand in the page, which escapes them.

Shapes: n images, F features.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from vicreg_hf.evaluation.report.gallery import Gallery, finite_rows, sample
from vicreg_hf.metrics.collapse import effective_rank, singular_values

MAX_NUMBERS = 2**25
"""Rows times columns of the features that a spectrum is of: all 50,000 rows of ResNet-18."""
MAX_CORRELATED = 2048
"""Number of dimensions whose correlations are shown, at most."""
MAX_MAPPED = 2000
ROUNDING = 1e-7
"""Singular values below this part of the largest are rounding errors of zero."""
MIN_TSNE = 30
"""A map of fewer images is a PCA."""
MAX_LEGEND = 20
INK, ACCENT = "#010203", "#010204"
"""Placeholders in figures for the colours of the page, which change with its theme."""
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
"""Tol's bright scheme, its grey darkened: distinguishable for the colour-blind, on both themes."""
MARKERS = ("o", "^", "s")
"""Three shapes and seven colours, stepped through together, tell 21 classes apart."""
STYLE: Any = {
    "svg.hashsalt": "vicreg", "svg.fonttype": "none", "font.size": 11, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.formatter.useoffset": False,
}  # fmt: skip


def to_svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure as an element of the page, in the page's colours and font.

    Args:
        name: unlike that of any other figure in the page.
        description: instead of the figure, for those who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    opening = re.search(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", svg)
    assert opening is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[opening.end() :], flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    body = body.replace(INK, "currentColor").replace(ACCENT, "var(--accent)")
    label = escape(description)
    return Markup(f'<svg role="img" aria-label="{label}" {opening[1]}>{body}')


# --- the spectrum
def spectrum(gallery: Gallery, *, seed: int, prefix: str = "") -> dict[str, Any] | None:
    """How features spread over their dimensions; None if fewer than two rows are finite.

    Args:
        prefix: what the names of the figures begin with, to tell those of several encoders apart.

    Returns:
        The contents of the page's section: numbers and figures, of which there are none if nothing
        varies.
    """
    finite = finite_rows(gallery.features)
    width = gallery.features.shape[1]
    rows = sample(finite, max(2, MAX_NUMBERS // max(1, width)), seed)
    if len(rows) < 2 or width == 0:
        return None
    x = gallery.features[torch.from_numpy(rows)].cpu().double()
    # a feature that is the same everywhere keeps no rounding error of its mean
    x = torch.where((x == x[0]).all(0), 0.0, x - x.mean(0))
    std = x.std(0)
    found: dict[str, Any] = {
        "rows": len(rows), "of": len(gallery.features), "width": width,
        "not_finite": len(gallery.features) - len(finite), "constant": int((std == 0).sum()),
        "figures": [],
    }  # fmt: skip
    if not bool(std.any()):
        return found
    singular = singular_values(x).flip(0)
    found["effective_rank"] = effective_rank(x).item()
    found["figures"] = [
        _draw_histogram(
            f"{prefix}std", std.numpy(), "standard deviation of a dimension", "dimensions"
        )
    ]
    relative = singular[: min(len(x) - 1, width)] / singular[0]
    relative = relative[relative > ROUNDING]
    if len(relative) > 1:  # one point is no curve
        found["figures"].insert(0, _draw_singular(f"{prefix}spectrum", relative.numpy()))
    varying = sample(std.nonzero().flatten().numpy(), MAX_CORRELATED, seed)
    if len(varying) > 1:
        unit = torch.nn.functional.normalize(x[:, torch.from_numpy(varying)], dim=0, eps=0)
        pairs = (unit.T @ unit).numpy()[np.triu_indices(len(varying), k=1)].clip(-1, 1)
        found["figures"].append(
            _draw_histogram(
                f"{prefix}correlation",
                pairs,
                "correlation of two dimensions",
                "pairs",
                limits=(-1.0, 1.0),
            )
        )
    return found


def _draw_singular(name: str, relative: NDArray[np.float64]) -> Markup:
    figure, axes = _figure()
    ranks = np.arange(1, len(relative) + 1)
    axes.semilogy(ranks, relative, ".-", color=ACCENT, lw=1.3, markersize=2)
    if relative.min() > 0.02:  # too few powers of ten for an axis
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()
    axes.set(xlabel="rank", ylabel="singular value / largest")
    return to_svg(
        figure, name,
        f"Singular values of the centred features, {len(relative)} of them, on a logarithmic axis; "
        f"half way down the ranks the value is {relative[len(relative) // 2]:.2g} of the largest.",
    )  # fmt: skip


def _draw_histogram(
    name: str,
    values: NDArray[np.float64],
    xlabel: str,
    ylabel: str,
    *,
    limits: tuple[float, float] | None = None,
) -> Markup:
    figure, axes = _figure()
    axes.hist(values, bins=40, range=limits, color=ACCENT, histtype="stepfilled")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.locator_params(nbins=5)
    axes.ticklabel_format(scilimits=(-3, 4))
    return to_svg(
        figure, name,
        f"Histogram of the {xlabel}: {len(values):,} {ylabel}, from {values.min():.2g} to "
        f"{values.max():.2g}, median {np.median(values):.2g}.",
    )  # fmt: skip


def _figure() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4, 2.9), layout="constrained")
        return figure, figure.subplots()


# --- the map
def feature_map(gallery: Gallery, *, seed: int, prefix: str = "") -> dict[str, Any] | None:
    """A map of test features; None where there is nothing to lay out.

    Args:
        prefix: as of `spectrum`.

    Returns:
        The contents of the page's section: the figure, the method and the classes of the legend.
    """
    rows = sample(finite_rows(gallery.features), MAX_MAPPED, seed)
    x = gallery.features[torch.from_numpy(rows)].cpu().double()
    if len(x) < 3:
        return None
    method = "PCA" if len(x) < MIN_TSNE else "t-SNE"
    points = _layout(torch.nn.functional.normalize(x, dim=1).numpy(), method, seed)
    if points is None:
        return None
    labels = None if gallery.labels is None else gallery.labels.numpy()
    own = np.zeros(len(rows), np.int64) if labels is None else labels[rows]
    classes, places = np.unique(own, return_inverse=True)
    return {
        "method": method, "rows": len(rows), "of": len(gallery.features),
        "classes": [] if labels is None else classes.tolist(),
        "legend": labels is not None and len(classes) <= MAX_LEGEND,
        "figure": _draw_map(f"{prefix}map", points, places, method),
    }  # fmt: skip


def _layout(x: NDArray[np.float64], method: str, seed: int) -> NDArray[np.float64] | None:
    """Places (n, 2) of unit-length rows; None where all point the same way."""
    x = np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))
    # the order in which threads add up would show in the map
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PCA divides by the whole variance
        points = PCA(2, random_state=seed).fit_transform(x)
        spread = points[:, 0].std()
        if not spread > 1e-9:  # scikit-learn's own start would divide by it, and crash on NaN
            return None
        if method == "PCA":
            return points
        start = (1e-4 * points / spread).astype(np.float32)
        perplexity = min(30.0, (len(x) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init=start, metric="cosine", random_state=seed)
        return tsne.fit_transform(x)


def _draw_map(
    name: str, points: NDArray[np.float64], classes: NDArray[np.int64], method: str
) -> Markup:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 4.4))
        axes = figure.add_axes((0, 0, 1, 1))
    size = 14 if len(points) > 500 else 28
    for index in np.unique(classes):
        x, y = points[classes == index].T
        axes.scatter(
            x, y, s=size, c=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
            linewidths=0, alpha=0.8,
        )  # fmt: skip
    axes.set_axis_off()
    return to_svg(
        figure, name,
        f"{method} map of the features of {len(points):,} test images, "
        f"{len(np.unique(classes))} classes; places are in arbitrary units.",
    )  # fmt: skip
