"""Data sets that are given in Python: torch's, which give items one by one, and `datasets`'.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from vicreg_hf.data.columns.base import ImageError
from vicreg_hf.data.columns.image_files import to_uint8
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.opening.slicing import Splits
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.console import warn
from vicreg_hf.views.operations import as_pixels
from vicreg_hf.views.reduced import Reduction

GIVEN = "python:"
"""How the names of such data sets begin; no path or Hub id does."""
IMAGE, LABEL = "image", "label"
COMPARED = 8
"""Items that are read twice, to see whether they come the same."""
MOST_READ = 50_000
"""Items of which labels are read one by one, which costs a pass over the images."""


@dataclass(frozen=True)
class ItemColumn(ImageColumn):
    """The images of a torch `Dataset`; a cell is the number of an item."""

    dataset: Any = None
    varies: bool = False
    """Whether an item comes otherwise each time, as where the data set draws transforms."""

    def prepare(self, table: Any) -> Any:
        return table.select_columns([self.name])

    def encoded(self, cell: Any) -> bytes:
        pixels = self._pixels(cell)
        return str(pixels.shape).encode() + pixels.tobytes()

    def decode(self, cell: Any, reduction: Reduction | None = None) -> Tensor:  # noqa: ARG002
        pixels = self._pixels(cell)
        if pixels.dtype != np.uint8 and self.value_range is None:
            raise ImageError(
                f"the image has values of {pixels.dtype}, and no value_range says which become "
                "black and white."
            )
        return torch.from_numpy(np.ascontiguousarray(to_uint8(pixels, self.value_range)))

    def digest(self, cells: Iterable[Any]) -> str:
        cells = list(cells)
        found = "varies" if self.varies else super().digest(cells)
        return found if found == "varies" or found == super().digest(cells) else "varies"

    def with_range(self, cells: Iterable[Any]) -> ImageColumn:
        cells = list(cells)
        if self.value_range is None:
            some = [values for values in map(self._known, cells[:COMPARED]) if values is not None]
            if some and all(v.dtype.kind == "f" and v.min() >= 0 and v.max() <= 1 for v in some):
                return replace(self, value_range=(0.0, 1.0))
        return super().with_range(cells)

    def _known(self, cell: Any) -> NDArray[Any] | None:
        try:
            return self._values(cell)
        except ImageError:
            return None

    def _values(self, cell: Any) -> NDArray[Any] | None:
        values = self._pixels(cell)
        return None if values.dtype == np.uint8 else values

    def _pixels(self, cell: Any) -> NDArray[Any]:
        """The image of an item, (C, H, W), in levels or in values of its own.

        Raises:
            ImageError: it cannot be read, or is no image.
        """
        try:
            item = self.dataset[cell]
        except Exception as error:  # data sets raise whatever their reading meets
            raise ImageError(
                f"the data set raised {type(error).__name__}: {one_line(error)}"
            ) from error
        try:
            image = image_of(item, self.name)
            if not isinstance(image, Tensor) or image.dtype == torch.uint8:
                return as_pixels(image, self.channels).numpy()
        except ValueError as error:
            raise ImageError(str(error)) from error
        if image.ndim != 3 or len(image) != self.channels or not image.numel():
            raise ImageError(
                f"the image must have the shape ({self.channels}, H, W), got {tuple(image.shape)}."
            )
        return image.detach().float().cpu().numpy()


def image_of(item: Any, name: str = IMAGE) -> Any:
    """The image of an item: itself, the first of a tuple, or of a dict what bears a name.

    Raises:
        ValueError: it is none of PIL and no tensor.
    """
    image = item
    if isinstance(item, Mapping):
        if name not in item:
            raise ValueError(
                f"an item must hold its image as {name!r}, got {', '.join(map(str, item))}; "
                "image_column names another."
            )
        image = item[name]
    elif isinstance(item, (tuple, list)) and item:
        image = item[0]
    if not isinstance(image, (Image.Image, Tensor)):
        raise ValueError(
            "an item of a data set must be an image of PIL or a tensor (C, H, W), a tuple that "
            f"begins with one, or a dict that holds one, got {type(image).__name__}."
        )
    return image


def splits_given(
    dataset: Any, image_column: str | None, label_column: str | None, channels: int
) -> tuple[Splits, ItemColumn | None]:
    """The splits of a data set given in Python, and the column that reads a torch `Dataset`.

    The items of a torch `Dataset` are the split train, of which `train[:90%]` is a part.

    Raises:
        ValueError: the data set is none, is empty, or its items hold no images.
    """
    if isinstance(dataset, datasets.DatasetDict):
        return {**dataset}, None
    if isinstance(dataset, datasets.Dataset):
        return {"train": dataset}, None
    streams = (IterableDataset, datasets.IterableDataset, datasets.IterableDatasetDict)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(
        dataset, (str, bytes, Mapping, *streams)
    ):  # fmt: skip
        raise ValueError(
            "train_dataset must have a length and items by number, as a map-style torch Dataset or "
            f"datasets.Dataset has, got {type(dataset).__name__}; dataset_name with streaming "
            "reads streams."
        )
    if not len(dataset):
        raise ValueError(f"train_dataset must hold images, got an empty {type(dataset).__name__}.")
    name = image_column or IMAGE
    column = ItemColumn(name, None, channels, dataset=dataset)
    first = next(
        filter(None, (_read(column, row) for row in range(min(COMPARED, len(dataset))))), None
    )
    if first is not None:
        image_of(first[0], name)
    if varies := _varies(column):
        warn(
            f"items of {type(dataset).__name__} come otherwise each time they are read, so a "
            "resumed run is not exact; leave random transforms to the run's augmentation."
        )
    columns: dict[str, Any] = {name: range(len(dataset))}
    labels = None if first is None else _labels(dataset, first[0], label_column or LABEL)
    features = {name: datasets.Value("int64")}
    if labels is not None:
        columns[label_column or LABEL] = labels
        features[label_column or LABEL] = _label_feature(dataset, labels)
    elif label_column is not None:
        raise ValueError(f"items of train_dataset must hold classes as {label_column!r}, got none.")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return {"train": table}, replace(column, varies=varies)


def name_given(dataset: Any) -> str:
    """The name that messages and cards give a data set."""
    info = getattr(dataset, "info", None)
    known = getattr(info, "dataset_name", None) or type(dataset).__name__
    return f"{GIVEN}{known}"


def _read(column: ItemColumn, row: int) -> tuple[Any] | None:
    """An item in a tuple, or None where it cannot be read."""
    try:
        return (column.dataset[row],)
    except Exception:  # reported when the row is used
        return None


def _varies(column: ItemColumn) -> bool:
    rows = range(min(COMPARED, len(column.dataset)))
    return ImageColumn.digest(column, rows) != ImageColumn.digest(column, rows)


def _labels(dataset: Any, first: Any, name: str) -> Sequence[Any] | None:
    """The class of each item, or None where items have none."""
    if _label(first, name) is None:
        return None
    indices, inner = None, dataset
    if isinstance(dataset, Subset):
        indices, inner = dataset.indices, dataset.dataset
    found = getattr(inner, "targets", None)  # as torchvision's data sets have them
    if found is not None and len(found) == len(inner):  # pyright: ignore[reportArgumentType]
        chosen = range(len(found)) if indices is None else indices
        return [_class(found[row]) for row in chosen]
    if len(dataset) > MOST_READ:
        warn(
            f"classes are not read one by one from {len(dataset):,} items; an attribute `targets` "
            "of the data set gives them all."
        )
        return None
    column = ItemColumn(IMAGE, None, dataset=dataset)
    items = (_read(column, row) for row in range(len(dataset)))
    return [None if item is None else _label(item[0], name) for item in items]


def _label(item: Any, name: str) -> int | str | None:
    if isinstance(item, Mapping):
        return _class(item.get(name))
    return _class(item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else None


def _class(value: Any) -> int | str | None:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        found = torch.as_tensor(value)
        value = found.item() if found.numel() == 1 else None
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole or isinstance(value, str) else None


def _label_feature(dataset: Any, labels: Sequence[Any]) -> Any:
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    names = getattr(inner, "classes", None)
    known = [label for label in labels if label is not None]
    if known and isinstance(known[0], str):
        return datasets.Value("string")
    named = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
    if named and names and all(-1 <= label < len(names) for label in known):
        return datasets.ClassLabel(names=list(names))
    return datasets.Value("int64")
