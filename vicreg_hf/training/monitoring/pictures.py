"""The pictures of a model card.

Shapes: N images, C channels, S side in pixels, F features, D embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor, nn

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.features.encode import extract_features
from vicreg_hf.features.maps import FEWEST, colours_of_maps, maps_of, picture_of
from vicreg_hf.hub.card import LOSS_PICTURE, MAPS_PICTURE, RETRIEVAL_PICTURE, SPECTRUM_PICTURE
from vicreg_hf.hub.record import Picture
from vicreg_hf.metrics.retrieval import most_similar
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.files import replacing
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.training.run import Run

MAX_BANK = 2000
"""Images among which neighbours are looked for."""
QUERIES, NEIGHBOURS = 6, 6
"""Images that are looked up, and how many neighbours of each are shown."""
MAX_SPECTRUM = 1000
"""Images whose features have their singular values drawn."""
FEW_POINTS = 60
"""Points of a curve up to which each is marked."""
ROUNDING = 1e-7
"""Singular values below this part of the largest are rounding errors of zero."""
CLIFF = "The largest are 1; where a curve falls off a cliff, dimensions have collapsed."
MARKS = "✓ and blue mark images of the same class, ✗ and orange those of another."
INK, PLAIN, RIGHT, WRONG = "#000000", "#bbbbbb", "#0072b2", "#d55e00"
"""Colours of frames: of a query, of neighbours without classes, of the same and another class."""
LEFT_OUT = "{} is left out of the model card"


@dataclass(frozen=True, eq=False)
class Shown:
    """Some images of a split."""

    images: Tensor
    """(N, C, S, S) uint8."""
    features: Tensor
    """(N, F)."""
    classes: Sequence[str | None]
    """Names of the N images' classes; None where one is not known."""


def draw_pictures(run: Run, directory: Path) -> Iterator[Picture]:
    """Draw the pictures of a run's card, which is in a directory; one that fails is left out.

    Of a stream only the loss is drawn. Without held-out images others of the training split are
    looked up.

    Yields:
        Each picture that has been drawn, with what it shows.
    """
    model, held_out, train = run.published, run.inputs.held_out, run.inputs.train
    rows = [row for row in run.log.rows() if "loss" in row]
    with optional(LEFT_OUT.format(LOSS_PICTURE)):
        if len(rows) > 1:  # one point is no curve
            draw_loss_terms(rows, run.terms, directory / LOSS_PICTURE)
            told = "The loss, and its three terms before they are weighted."
            if run.loss_name is not None:
                told = f"The loss, which is `{run.loss_name}` in place of VICReg's, and its terms."
            yield Picture(LOSS_PICTURE, told)
    if isinstance(train, ImageStream):
        return
    cfg: Any = model.config.pretrained_cfg
    device = run.accelerator.device
    settings: Any = {"mean": cfg["mean"], "std": cfg["std"], "device": device}

    def read_and_encode(split: ImageSplit, chosen: NDArray[np.int64]) -> Shown:
        """Those of some images that can be used, with their representations."""
        bad = BadImages(len(split), 1.0, None)
        batches = evaluation_batches(
            split, chosen, cfg["input_size"][-1], crop_pct=cfg["crop_pct"], batch_size=128,
            num_workers=run.args.num_workers or 0, bad=bad,
        )  # fmt: skip
        images = torch.cat(list(batches))
        bad.agree(say=lambda _: None)
        usable = ~np.isin(chosen, np.array([image.row for image in bad.found], dtype=np.int64))
        images = images[torch.from_numpy(usable)]
        features = extract_features(model.encoder, images.split(128), **settings)
        return Shown(images, features, _class_names(split, chosen[usable]))

    chosen = permutation(len(train), seed=0, epoch=0, stream=Stream.SPLIT)[: QUERIES + MAX_BANK]
    searched, queried = np.sort(chosen[QUERIES:]), chosen[:QUERIES]
    source = "training images left out of the search"
    if held_out is not None:
        chosen = permutation(len(held_out), seed=0, epoch=0, stream=Stream.SPLIT)
        queried = chosen[:QUERIES]
        source = f"images of {held_out.name}"
    if len(searched) < 2 or len(queried) == 0:
        return
    bank = read_and_encode(train, searched)
    features = bank.features[:MAX_SPECTRUM]
    with optional(LEFT_OUT.format(SPECTRUM_PICTURE)):
        embeddings = extract_features(model.expander, [features], **settings)
        drawn = draw_spectrum(
            {"representations": features, "embeddings": embeddings}, directory / SPECTRUM_PICTURE
        )
        if drawn is not None:
            about = f"of {len(features)} images of {train.name}"
            yield Picture(SPECTRUM_PICTURE, f"Singular values of {drawn} {about}. {CLIFF}")
    with optional(LEFT_OUT.format(RETRIEVAL_PICTURE)):
        queries = read_and_encode(held_out or train, queried)
        marked = draw_retrievals(queries, bank, directory / RETRIEVAL_PICTURE)
        told = (
            f"Left, {source}; beside each, its nearest neighbours by cosine similarity, which "
            "stands below, of the encoder's features among "
            f"{len(bank.images):,} images of {train.name}."
        )
        yield Picture(RETRIEVAL_PICTURE, told + (f" {MARKS}" if marked else ""))
    with optional(LEFT_OUT.format(MAPS_PICTURE)):
        path = directory / MAPS_PICTURE
        path.unlink(missing_ok=True)
        shown = read_and_encode(held_out or train, queried).images
        if (maps := _maps(model.encoder, shown, settings)) is not None:
            draw_maps(shown, maps, path)
            told = (
                f"Above, {source}; below, the first three principal components of the features at "
                "each position of the encoder's last map, as red, green and blue."
            )
            yield Picture(MAPS_PICTURE, told)


def _maps(encoder: nn.Module, images: Tensor, settings: Any) -> Tensor | None:
    """The maps (N, h, w, F) of images; None where there are none, or of few positions."""
    try:
        found = maps_of(encoder, images, **settings)
    except ValueError:
        return None
    return found if found.shape[1] * found.shape[2] >= FEWEST else None


def _class_names(split: ImageSplit, rows: NDArray[np.int64]) -> list[str | None]:
    """The class of each of some images by its name, or None where it is not known."""
    if split.labels is None:
        return [None] * len(rows)
    names = dict(enumerate(split.label_names or ()))
    numbers = split.labels[torch.from_numpy(rows)].tolist()
    return [names.get(number, str(number)) if number >= 0 else None for number in numbers]


def draw_loss_terms(rows: Sequence[Mapping[str, Any]], terms: Sequence[str], path: Path) -> None:
    """Draw the loss and its terms over the steps, from rows of metrics.jsonl with a loss."""
    marker = "o" if len(rows) <= FEW_POINTS else None
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    subplots = figure.subplots(1, len(terms), squeeze=False)[0]
    for axes, term in zip(subplots, terms, strict=True):
        known = [row for row in rows if term in row]
        axes.plot(
            [row["step"] for row in known], [row[term] for row in known], linewidth=1,
            marker=marker, markersize=3,
        )  # fmt: skip
        axes.set(title=term, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
    _save(figure, path)


def draw_spectrum(features: Mapping[str, Tensor], path: Path) -> str | None:
    """Draw the singular values of centred features (N, F) of each kind, the largest as 1.

    Each curve ends at min(N - 1, F), the most that differ from 0, or before where all the rest is
    rounding.

    Returns:
        A phrase that says what is drawn, or None where there is nothing to draw.

    Source: Jing et al. 2022, "Understanding Dimensional Collapse", arXiv:2110.09348, figure 2.
    """
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    told = []
    for name, rows in features.items():
        relative, width = relative_spectrum(rows), rows.shape[1]
        count = min(len(rows) - 1, width)
        if len(relative) < 2:
            continue
        marker = "o" if len(relative) <= FEW_POINTS else None
        axes.semilogy(
            range(1, len(relative) + 1), relative, label=name, marker=marker, markersize=3
        )
        all_of_them = f"all {width}" if count == width else f"{count} of {width}, for so few images"
        lost = f", of which {count - len(relative)} are 0" if len(relative) < count else ""
        told.append(f"the centred {name} ({all_of_them}{lost})")
    if not told:
        path.unlink(missing_ok=True)
        return None
    axes.set(xlabel="rank", ylabel="singular value / largest")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend()
    axes.margins(x=0.01)
    _save(figure, path)
    return " and ".join(told)


def relative_spectrum(features: Tensor) -> Tensor:
    """Singular values of centred features (N, F), the largest as 1, at most min(N - 1, F).

    Those that are rounding errors of 0 are left out.
    """
    x = features.double().cpu()
    # a dimension that is the same everywhere keeps no rounding error of its mean
    x = torch.where((x == x[0]).all(0), 0.0, x - x.mean(0))
    singular = torch.linalg.svdvals(x)[: min(len(x) - 1, x.shape[1])]
    relative = singular / singular[0]
    return relative[relative > ROUNDING]


def draw_retrievals(queries: Shown, bank: Shown, path: Path) -> bool:
    """Draw each query beside its nearest images, with similarities and whether classes agree.

    Returns:
        Whether classes of some query and of a neighbour are known.
    """
    most = min(NEIGHBOURS, len(bank.images))
    similarities, nearest = most_similar(bank.features, queries.features, most)
    count, marked = len(queries.images), False
    height = 0.2 + 1.25 * count
    figure, axes = _board(most + 1, height)
    axes.text(0.5, height - 0.16, "image", fontsize=9, ha="center")
    axes.text(1.04, height - 0.16, "nearest", fontsize=9)
    for row, (near, close) in enumerate(zip(nearest.tolist(), similarities.tolist(), strict=True)):
        own, top = queries.classes[row], height - 0.22 - 1.25 * row
        _show(axes, 0, top, queries.images[row], own or "", INK)
        for left, (index, similarity) in enumerate(zip(near, close, strict=True), 1):
            other = bank.classes[index]
            marked |= own is not None and other is not None
            _show(axes, left, top, bank.images[index], *below_neighbour(similarity, own, other))
    _save(figure, path)
    return marked


def draw_maps(images: Tensor, maps: Tensor, path: Path) -> None:
    """Draw images (N, C, S, S) uint8 above the principal components of their maps (N, h, w, F)."""
    colours = colours_of_maps(maps, (images.shape[2], images.shape[3]))
    figure, axes = _board(len(images), 2.04)
    for top, pictures in ((2, images), (1, colours)):
        for left, shown in enumerate(pictures):
            _show(axes, left, top, shown, "", PLAIN)
    _save(figure, path)


def below_neighbour(similarity: float, own: str | None, other: str | None) -> tuple[str, str]:
    """The text below a neighbour and the colour of its frame, by the classes of query and it."""
    if own is None or other is None:
        return f"{similarity:.2f}", PLAIN
    return (f"{similarity:.2f} ✓", RIGHT) if own == other else (f"{similarity:.2f} ✗", WRONG)


def _board(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure and its axes, both in inches.

    They are one pair for all pictures, as dozens of axes with a layout take matplotlib seconds.
    """
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
    axes.axis("off")
    return figure, axes


def _show(axes: Axes, left: float, top: float, image: Tensor, below: str, colour: str) -> None:
    """Show an image (C, S, S) uint8 in a frame, with a line of text that is no formula."""
    side, left = 0.92, left + 0.04
    low = top - side
    axes.imshow(picture_of(image), extent=(left, left + side, low, top), aspect="auto")
    axes.add_patch(Rectangle((left, low), side, side, fill=False, edgecolor=colour, linewidth=0.8))
    short = below if len(below) <= 14 else f"{below[:13]}…"
    text = {"ha": "center", "va": "top", "fontsize": 8, "parse_math": False}
    axes.text(left + side / 2, low - 0.03, short, **text)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a class's name, say
        figure.savefig(aside, dpi=100, format="png", metadata={"Software": None})
