"""What the report shows of features: their spectrum, a map of them, and nearest neighbours.

Figures hold no text from outside: names of classes stand in the page, which escapes them.

Shapes: N training images, M test images, n of either, C channels, F features.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from vicreg_hf.evaluation.collapse import effective_rank
from vicreg_hf.evaluation.knn import knn_predict

MAX_NUMBERS = 2**25
"""Features, rows times columns, that statistics are taken of: all 50,000 rows of ResNet-18."""
MAX_CORRELATED = 2048
"""Dimensions whose correlations are drawn."""
MAX_MAPPED = 2000
MIN_TSNE = 30
"""Images below which the map is a PCA."""
MAX_LEGEND = 20
CASES = 6
"""Test images, of either kind, that are shown beside their neighbours."""
NEIGHBOURS = 6
CANDIDATES = 2000
"""Test images among which cases are looked for."""
K = 20
THUMBNAIL = 96
"""Pixels of a thumbnail's longer side, at most."""
LOSSLESS_BYTES = 4096
"""Thumbnails that are larger as PNG are JPEG."""
INK, ACCENT = "#010203", "#010204"
"""Stand in figures for the colours of the page, which change with its theme."""
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


@dataclass(frozen=True, eq=False)
class Gallery:
    """The images of a split, and their features."""

    features: Tensor
    """(n, F)."""
    labels: Tensor | None
    """(n,) integers from 0."""
    read: Callable[[Sequence[int]], list[Tensor]]
    """Gives images (C, H, W) uint8 of any sizes for their rows; what follows RGB is not shown."""


def finite_rows(features: Tensor) -> NDArray[np.int64]:
    """The rows that hold neither NaN nor infinity."""
    return features.isfinite().all(1).nonzero().flatten().cpu().numpy()


def sample(rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """At most so many of the rows, drawn at random and in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


# --- pictures in the page


@dataclass(frozen=True)
class Inline:
    """A picture as the page holds it."""

    uri: str
    width: int
    height: int


def thumbnail(image: Tensor) -> Inline:
    """A small picture of an image (C, H, W) uint8 of any size."""
    shown = (image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0)
    picture = Image.fromarray(shown.cpu().contiguous().numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    inline = as_png(picture)
    if len(inline.uri) * 3 // 4 <= LOSSLESS_BYTES:
        return inline
    return _encoded(picture, "jpeg", quality=85)


def as_png(picture: Image.Image, **options: Any) -> Inline:
    return _encoded(picture, "png", optimize=True, **options)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> Inline:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Inline(f"data:image/{kind};base64,{data}", *picture.size)


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


def spectrum(gallery: Gallery, split: str, *, seed: int) -> dict[str, Any] | None:
    """How features spread over their dimensions; None if fewer than two rows are finite.

    Returns:
        What the page's section shows: numbers and figures, which are absent if nothing varies.
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
        "split": split, "rows": len(rows), "of": len(gallery.features), "width": width,
        "not_finite": len(gallery.features) - len(finite), "constant": int((std == 0).sum()),
        "figures": [],
    }  # fmt: skip
    if not bool(std.any()):
        return found
    gram = x @ x.T if len(x) < width else x.T @ x
    singular = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    found["effective_rank"] = effective_rank(x).item()
    found["figures"] = [
        _draw_singular(singular[: min(len(x) - 1, width)].numpy()),
        _draw_histogram("std", std.numpy(), "standard deviation of a dimension", "dimensions"),
    ]
    varying = sample(std.nonzero().flatten().numpy(), MAX_CORRELATED, seed)
    if len(varying) > 1:
        found["figures"].append(_draw_correlations(x[:, torch.from_numpy(varying)]))
    return found


def _draw_singular(singular: NDArray[np.float64]) -> Markup:
    figure, axes = _figure()
    relative = singular / singular[0]
    # what rounding leaves of a zero says nothing
    shown = np.where(relative > 1e-7, relative, np.nan)
    axes.semilogy(np.arange(1, len(shown) + 1), shown, ".-", color=ACCENT, lw=1.3, markersize=2)
    if np.nanmin(shown) > 0.02:  # too few powers of ten for an axis
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.minorticks_off()
    axes.set(xlabel="rank", ylabel="singular value / largest")
    return to_svg(
        figure, "spectrum",
        f"Singular values of the centred features, {len(singular)} of them, on a logarithmic axis; "
        f"half way down the ranks the value is {relative[len(relative) // 2]:.2g} of the largest.",
    )  # fmt: skip


def _draw_correlations(x: Tensor) -> Markup:
    scaled = x / x.norm(dim=0)
    correlations = (scaled.T @ scaled).numpy()[np.triu_indices(x.shape[1], k=1)]
    return _draw_histogram(
        "correlation", correlations.clip(-1, 1), "correlation of two dimensions", "pairs",
        limits=(-1.0, 1.0),
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


def feature_map(
    gallery: Gallery, labels: NDArray[np.int64] | None, *, seed: int
) -> dict[str, Any] | None:
    """A map of test features; None where there is nothing to lay out.

    Args:
        labels: (n,) of the gallery's images.

    Returns:
        What the page's section shows: the figure, the method and the classes of the legend.
    """
    rows = sample(finite_rows(gallery.features), MAX_MAPPED, seed)
    x = gallery.features[torch.from_numpy(rows)].cpu().double()
    if len(x) < 3:
        return None
    method = "PCA" if len(x) < MIN_TSNE else "t-SNE"
    points = _layout(torch.nn.functional.normalize(x, dim=1).numpy(), method, seed)
    if points is None:
        return None
    shown = np.zeros(len(rows), np.int64) if labels is None else labels[rows]
    classes = np.unique(shown)
    return {
        "method": method, "rows": len(rows), "of": len(gallery.features),
        "classes": [] if labels is None else classes.tolist(),
        "legend": labels is not None and len(classes) <= MAX_LEGEND,
        "figure": _draw_map(points, np.searchsorted(classes, shown), method),
    }  # fmt: skip


def _layout(x: NDArray[np.float64], method: str, seed: int) -> NDArray[np.float64] | None:
    """Places (n, 2) of rows of length 1; None where all point the same way."""
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


def _draw_map(points: NDArray[np.float64], classes: NDArray[np.int64], method: str) -> Markup:
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
        figure, "map",
        f"{method} map of the features of {len(points):,} test images, "
        f"{len(np.unique(classes))} classes; places are in arbitrary units.",
    )  # fmt: skip


# --- nearest neighbours


@dataclass(frozen=True)
class Shown:
    """An image of a case."""

    picture: Inline
    label: int | None
    similarity: float | None = None
    """Cosine similarity to the case's test image."""


@dataclass(frozen=True)
class Case:
    """A test image beside its nearest training images."""

    query: Shown
    voted: int | None
    near: Sequence[Shown]


def neighbours(
    train: Gallery, test: Gallery, labels: NDArray[np.int64] | None, *, seed: int
) -> dict[str, Any] | None:
    """Test images beside their nearest training images; None if either split has none.

    Args:
        labels: (M,) of the test images; without them, or those of training images, cases are
            not told apart.

    Returns:
        What the page's section shows: k, and groups of cases.
    """
    bank, rows = finite_rows(train.features), finite_rows(test.features)
    if not len(bank) or not len(rows):
        return None
    candidates = np.random.default_rng(seed).permutation(rows)[:CANDIDATES]
    features, k = _take(train.features, bank), min(K, len(bank))
    groups: dict[str, NDArray[np.int64]] = {"": candidates}
    votes: dict[int, int] = {}
    if labels is not None and train.labels is not None:
        voted = knn_predict(
            features, train.labels[torch.from_numpy(bank)].long().to(features.device),
            _take(test.features, candidates).to(features), k=k,
        ).cpu().numpy()  # fmt: skip
        votes = dict(zip(candidates.tolist(), voted.tolist(), strict=True))
        right = voted == labels[candidates]
        groups = {"right": candidates[right], "wrong": candidates[~right]}
    shown = []
    for kind, members in groups.items():
        chosen = members[:CASES]
        found, similarity = _nearest(features, _take(test.features, chosen).to(features))
        cases = _cases(train, test, labels, chosen, bank[found], similarity, votes)
        shown.append({"kind": kind, "of": len(members), "cases": cases})
    return {
        "k": k, "images": len(bank), "candidates": len(candidates), "of": len(rows),
        "groups": shown,
    }  # fmt: skip


def _cases(
    train: Gallery,
    test: Gallery,
    labels: NDArray[np.int64] | None,
    chosen: NDArray[np.int64],
    found: NDArray[np.int64],
    similarity: NDArray[np.float32],
    votes: dict[int, int],
) -> list[Case]:
    if not len(chosen):
        return []
    queries = test.read(chosen.tolist())
    images = iter(train.read(found.flatten().tolist()))
    cases = []
    for row, image, near, close in zip(chosen.tolist(), queries, found, similarity, strict=True):
        query = Shown(thumbnail(image), None if labels is None else int(labels[row]))
        shown = [
            Shown(
                thumbnail(next(images)),
                None if train.labels is None else int(train.labels[index]),
                float(value),
            )
            for index, value in zip(near.tolist(), close, strict=True)
        ]
        cases.append(Case(query, votes.get(row), shown))
    return cases


def _take(features: Tensor, rows: NDArray[np.int64]) -> Tensor:
    if len(rows) == len(features) and bool((np.diff(rows) == 1).all()):
        return features.float()
    return features[torch.from_numpy(rows).to(features.device)].float()


def _nearest(bank: Tensor, queries: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of the bank nearest in cosine similarity, and the similarity."""
    lengths = bank.norm(dim=1).clamp(min=1e-12)
    similarity = torch.nn.functional.normalize(queries, dim=1) @ bank.T / lengths
    nearest = similarity.topk(min(NEIGHBOURS, len(bank)), dim=1)
    return nearest.indices.cpu().numpy(), nearest.values.cpu().numpy()
