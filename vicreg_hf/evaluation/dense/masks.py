"""Masks, which give each pixel of an image the number of its class; checked before any work.

Shapes: N images of a split, P pixels of an image that are learned from, K classes, H x W pixels.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vicreg_hf.data.bad_images import check_share
from vicreg_hf.data.columns.base import BadImage, path_of
from vicreg_hf.data.columns.finding import find_image_column, holds_images
from vicreg_hf.data.columns.image_files import FORMATS, MAX_PIXELS, ImageError, upright_size
from vicreg_hf.data.columns.reading import FileColumn
from vicreg_hf.data.labelled import LabelledData
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.data.samples import Samples
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.dense.head import PixelSample
from vicreg_hf.metrics.segmentation import VOID
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import decode_text
from vicreg_hf.settings.evaluation import EvaluationArguments

WORDS = ("mask", "seg", "annotation", "label", "target", "gt")
"""Parts of the names of columns that are taken for masks."""
SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Endings of files in a folder of masks, in the order in which they are looked for."""
NUMBERED = ("1", "L", "P", "I")
"""Modes of PIL, and beginnings of them, in which a pixel is one whole number."""
MOST_CLASSES = 1000
PIXELS = 2048
"""Pixels of each training image that are learned from, chosen by seed; of fewer, all."""


class MaskError(ValueError):
    """A mask that shows a mistake in the data, and not only damage of one file."""


@dataclass(frozen=True)
class MaskColumn(FileColumn):
    """A column of image files whose pixels are whole numbers."""

    def decode(self, cell: Any) -> NDArray[np.int64]:
        """The numbers of a cell's pixels, (H, W), those of a palette's entries where it has one.

        Raises:
            ImageError: the file cannot be read.
            MaskError: it is no mask.
        """
        if not (data := self.encoded(cell)):
            raise ImageError("there is no mask.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    _check_kind(image)
                    return np.asarray(image).astype(np.int64)
        except MaskError:
            raise
        except Exception as error:  # decoders raise whatever their parsing meets
            raise ImageError(f"the mask cannot be decoded: {one_line(error)}") from error


def _check_kind(image: Image.Image) -> None:
    if image.format == "JPEG":
        raise MaskError("is a JPEG, whose compression changes numbers; save masks as PNG")
    if not image.mode.startswith(NUMBERED) or image.mode in ("LA", "PA", "LAB"):
        raise MaskError(
            f"has pixels of {image.mode}; save it in gray or with a palette, each colour as the "
            "number of its class"
        )
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"the mask has {image.width} x {image.height} pixels.")


@dataclass
class Masks:
    """The masks of both splits, and the classes that they show."""

    samples: Mapping[str, Samples[NDArray[np.int64]]]
    """Those of "train" and "test", row by row as the images."""
    void: frozenset[int]
    """Numbers that count for nothing."""
    declared: Mapping[int, str] | None
    """Names of classes by their numbers, where they are given."""
    values: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(K,) numbers of the classes that occur, ascending."""
    learned: PixelSample | None = None
    """The pixels of the N training images that are learned from."""
    left_out: dict[str, list[BadImage]] = field(default_factory=dict)
    """The rows of each split whose masks cannot be used."""

    @property
    def names(self) -> tuple[str, ...]:
        """(K,) names of the classes; their numbers where no names are given."""
        named = self.declared or {}
        return tuple(named.get(value, str(value)) for value in self.values.tolist())

    def classes(self, part: str, row: int) -> Tensor:
        """(H, W) classes from 0 of a mask's pixels, `VOID` where they count for nothing."""
        (mask,) = self.samples[part].read([row])
        return torch.from_numpy(self._numbered(mask))

    def usable(self, part: str, rows: Tensor) -> Tensor:
        """Those of some rows whose masks can be used."""
        bad = torch.tensor([image.row for image in self.left_out[part]], dtype=torch.long)
        return rows[~torch.isin(rows, bad)]

    def _numbered(self, mask: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.searchsorted(self.values, mask).clip(max=len(self.values) - 1)
        return np.where(self.values[found] == mask, found, VOID)

    def read(self, images: Mapping[str, ImageSplit], *, seed: int, max_bad_fraction: float) -> None:
        """Look at every mask, so that nothing is found amiss later; find classes and pixels.

        Args:
            images: those of "train" and "test".
            seed: of the choice of pixels.
            max_bad_fraction: share of the masks that may be unreadable; they are left out.

        Raises:
            ValueError: a mask of another size than its image, or that is none; a number without a
                name; fewer than two classes; too many.
            ImageError: too many cannot be used.
        """
        first: dict[int, str] = {}
        shown: dict[str, set[int]] = {part: set() for part in self.samples}
        chosen = len(images["train"]), PIXELS
        places, numbers = np.zeros((*chosen, 2), np.float32), np.full(chosen, -1, np.int64)
        for part, samples in self.samples.items():
            self.left_out[part] = []
            for row, mask in self._each(part, images[part]):
                for value in np.unique(mask).tolist():
                    shown[part].add(value)
                    first.setdefault(value, samples.place(row))
                if part == "train":
                    found = _chosen_pixels(mask, self.void, seed=seed, row=row)
                    places[row, : len(found)] = _places(found, mask.shape)
                    numbers[row, : len(found)] = mask.ravel()[found]
        self.values = np.array(sorted(first.keys() - self.void), np.int64)
        self._check_classes(first)
        total = sum(map(len, images.values()))
        check_share(sum(map(len, self.left_out.values())), total, max_bad_fraction)
        known = [value for value in np.unique(numbers).tolist() if value in self.values]
        if len(known) < 2 or len(images["train"]) < 2:
            raise ValueError(
                f"protocol segmentation needs at least two classes in the masks of "
                f"{images['train'].name}, and two images, besides {self._void_text}; other numbers "
                "are void by --ignore_index, none makes 255 a class."
            )
        if not shown["test"] - self.void:
            raise ValueError(
                f"protocol segmentation needs a class in the masks of {images['test'].name}, got "
                f"none besides {self._void_text}; give another --eval_split."
            )
        learned = self._numbered(numbers)
        self.learned = PixelSample(torch.from_numpy(places), torch.from_numpy(learned))

    def _each(self, part: str, images: ImageSplit) -> Any:
        """Each row whose mask can be read, with its numbers; the others are noted."""
        samples = self.samples[part]
        for row in range(len(samples)):
            try:
                (sample,) = samples.try_read([row])
            except MaskError as error:
                raise ValueError(f"a mask must hold class numbers, and {samples.place(row)} "
                                 f"{error}.") from None  # fmt: skip
            if isinstance(sample, BadImage):
                self.left_out[part].append(sample)
                continue
            size, mask = _size_of(images, row), sample.content
            if size is not None and size != mask.shape:
                raise ValueError(
                    "a mask must have the height and width of its image, and "
                    f"{samples.place(row)} has {mask.shape[0]} x {mask.shape[1]}, its image "
                    f"{size[0]} x {size[1]}; resize it by nearest neighbour."
                )
            yield row, mask

    def _check_classes(self, first: Mapping[int, str]) -> None:
        if len(self.values) > MOST_CLASSES:
            raise ValueError(
                f"masks must hold at most {MOST_CLASSES} numbers of classes, got "
                f"{len(self.values)}; numbers of single objects must be made those of classes."
            )
        if beyond := [value for value in self.values.tolist() if not 0 <= value < 2**16]:
            raise ValueError(
                f"masks must hold numbers of classes from 0 to 65535, got {beyond[0]} in "
                f"{first[beyond[0]]}; number the classes anew, or give it to --ignore_index."
            )
        if self.declared is None:
            return
        numbers: dict[str, int] = {}
        for number, name in self.declared.items():
            if numbers.setdefault(name, number) != number:
                raise ValueError(
                    f"mask_names must name each class once, got {name!r} for {numbers[name]} and "
                    f"{number}; give the numbers of one class the same value in the masks."
                )
        if unknown := [value for value in self.values.tolist() if value not in self.declared]:
            raise ValueError(
                f"masks must hold the {len(self.declared)} numbers that have a name, or "
                f"{self._void_text}, got {unknown[0]} in {first[unknown[0]]}; name it in "
                "--mask_names, or give it to --ignore_index."
            )

    @property
    def _void_text(self) -> str:
        return f"void ({', '.join(map(str, sorted(self.void))) or 'none'})"


def _size_of(images: ImageSplit, row: int) -> tuple[int, ...] | None:
    """Height and width of an image; None where it cannot be read, which its reader says."""
    with suppress(ImageError):
        (cell,) = images.cells([row])
        if isinstance(images.column, FileColumn) and not isinstance(cell, list):
            return upright_size(images.column.encoded(cell))
        return tuple(images.decode(cell).shape[1:])
    return None


def _chosen_pixels(
    mask: NDArray[np.int64], void: frozenset[int], *, seed: int, row: int
) -> NDArray[np.int64]:
    """At most `PIXELS` numbers of pixels that are not void, chosen by (seed, row)."""
    known = np.flatnonzero(~np.isin(mask, list(void)))
    if len(known) <= PIXELS:
        return known
    return np.sort(np.random.default_rng([seed, row]).choice(known, PIXELS, replace=False))


def _places(pixels: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(P, 2) centres of pixels, as fractions of the image's height and width."""
    centres = np.stack(np.divmod(pixels, shape[1]), 1) + 0.5
    return (centres / np.array(shape)).astype(np.float32)


# --- where masks are
def open_masks(
    args: EvaluationArguments, splits: Splits, data: LabelledData, column: str | None
) -> Masks:
    """The masks of the images that are learned from and measured on, still to be read.

    Args:
        splits: tables with all columns.
        column: of the masks; None where they are in mask_dir.

    Raises:
        ValueError: a split without the column, masks that are not there, or no such names.
    """
    samples: dict[str, Samples[Any]] = {}
    for part, name, labelled in (("train", data.train_name, data.train),
                                 ("test", data.test_name, data.test)):  # fmt: skip
        images, table = labelled.split, splits[name]
        if column is None:
            samples[part] = masks_beside(images, args.dataset_name, str(args.mask_dir))
        elif column in table.features:
            samples[part] = column_of_masks(table, column, images.name)
        else:
            raise ValueError(
                f"mask_column must be in both splits, and {images.name} has no {column!r}."
            )
    features = splits[data.train_name].features
    return Masks(samples, args.void, read_mask_names(args.mask_names, features))


def find_mask_column(
    features: datasets.Features, image_column: str | None, mask_column: str | None
) -> tuple[str | None, str]:
    """The columns of images and of masks: those asked for, or the only ones they can be.

    Returns:
        The image column, None where another one must say which it is; and that of the masks.

    Raises:
        ValueError: no such column, or none or several to choose from.
    """
    columns = [name for name, kind in features.items() if holds_images(kind)]
    others = [name for name in columns if name != image_column]
    if mask_column is None:
        named = [name for name in others if any(word in name.lower() for word in WORDS)]
        found = others if image_column is not None and len(others) == 1 else named
        if len(found) != 1:
            raise ValueError(
                "mask_column must be given unless exactly one column of images is called after "
                f"masks, got {len(found)}; columns of images: {', '.join(columns) or 'none'}; all: "
                f"{', '.join(features)}. --mask_dir names a folder of masks."
            )
        mask_column = str(found[0])
    else:
        find_image_column(features, mask_column, "mask_column")  # which refuses others
    if image_column is None:
        others = [name for name in columns if name != mask_column]
        image_column = others[0] if len(others) == 1 else None
    if image_column == mask_column:
        raise ValueError(
            f"mask_column must be another than image_column, got {mask_column!r} for both."
        )
    return image_column, mask_column


def column_of_masks(table: Any, column: str, name: str) -> Samples[Any]:
    """The masks in a column of a table, for a split of that name."""
    own = table.select_columns([column])
    if isinstance(own.features[column], datasets.Image):
        own = own.cast_column(column, datasets.Image(decode=False))
    return Samples(own, MaskColumn(column), name)


def masks_beside(images: ImageSplit, image_dir: str, mask_dir: str) -> Samples[Any]:
    """The masks in a folder of the images of another, by their names.

    Raises:
        ValueError: images that are not in a folder, or one whose mask is not there.
    """
    root, folder = Path(image_dir).resolve(), Path(mask_dir)
    if not folder.is_dir():
        raise ValueError(f"mask_dir must be a folder, got {mask_dir!r}.")
    files = []
    for row in range(len(images)):
        path = path_of(images.cells([row])[0])
        if path is None or not root.is_dir() or not Path(path).is_relative_to(root):
            raise ValueError(
                f"mask_dir is for a folder of images, and {images.place(row)} is in none; name the "
                "column of masks by --mask_column."
            )
        bare = folder / Path(path).relative_to(root)
        found = [file for s in SUFFIXES if (file := bare.with_suffix(s)).is_file()]
        if not found:
            raise ValueError(
                f"mask_dir must hold a mask of each image, and has no "
                f"{bare.relative_to(folder).with_suffix(SUFFIXES[0])} for {images.place(row)}."
            )
        files.append(str(found[0]))
    table = datasets.Dataset.from_dict({"mask": files})
    return Samples(table, MaskColumn("mask"), images.name)


def read_mask_names(given: str | None, features: datasets.Features) -> dict[int, str] | None:
    """Names of classes by their numbers in masks, from a file or from a column that declares them.

    Raises:
        ValueError: neither, or a file that holds none.
    """
    if given is None:
        return None
    kind = features.get(given)
    kind = getattr(kind, "feature", kind)  # of a list
    if isinstance(kind, datasets.ClassLabel):
        return dict(enumerate(kind.names))
    try:
        text = decode_text(Path(given).read_bytes())
        if not given.lower().endswith(".json"):
            return {k: line.strip() for k, line in enumerate(text.splitlines()) if line.strip()}
        loaded = json.loads(text)
        pairs = loaded.items() if isinstance(loaded, dict) else enumerate(loaded)
        return {int(number): str(name) for number, name in pairs}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            "mask_names must be a text file with a name in each line, a JSON file of names by "
            f"number, or a column that declares classes, got {given!r}: {one_line(error)}"
        ) from error
