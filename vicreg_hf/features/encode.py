"""The features of parts of a data set: encoded batch by batch, each part written when it is whole.

Shapes: B images, C channels, S side in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.reading import zip_and_name
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.features.parts import Part, write_part
from vicreg_hf.runtime.transfer import on_device


class Batch(NamedTuple):
    """What a worker makes of some rows."""

    rows: list[int]
    paths: list[str | None]
    images: Tensor | None
    """(B, C, S, S), of the rows that have one; None if none has."""
    bad: list[BadImage]


def features_of(
    encoder: Encoder,
    splits: dict[str, ImageSplit],
    parts: Sequence[Part],
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    dtype: str = "float32",
    root: str = "",
    show: bool = False,
) -> Iterator[list[BadImage]]:
    """Write the features of some parts, and yield for each the images that could not be used.

    Args:
        encoder: its module on the device.
        parts: of the splits, in the order in which they are made.
        root: folder of the data, of which paths are shown as parts.
        show: a progress bar.
    """
    encoder.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pinned = device.type == "cuda"
    batches = [
        (part, part.rows[start : start + batch_size])
        for part in parts
        for start in range(0, len(part.rows), batch_size)
    ]
    loader = DataLoader(
        _Views(splits, batches, encoder), batch_size=None, num_workers=num_workers,
        pin_memory=pinned, prefetch_factor=4 if num_workers else None,
    )  # fmt: skip
    bar = tqdm(total=sum(len(part.rows) for part in parts), unit="image", disable=not show)
    # should all images of a part be bad, its column is as wide as the others'
    empty = torch.empty(0, encoder.num_features, device=device)
    made: list[Batch] = []
    features: list[Tensor] = []
    written: tuple[Future[None], list[BadImage]] | None = None
    with bar, ThreadPoolExecutor(1) as writer:
        for (part, rows), batch in zip(batches, loader, strict=True):
            made.append(batch)
            if batch.images is not None:
                features.append(encode(encoder, batch.images, device))
            bar.update(len(rows))
            if rows[-1] != part.rows[-1]:
                continue
            if written is not None:
                written[0].result()
                yield written[1]
            found = torch.cat([empty, *features]).cpu().numpy()
            bad = [image for batch in made for image in batch.bad]
            # written while the next part is made
            done = writer.submit(_write, part, splits[part.split], made, found.astype(dtype), root)
            written, made, features = (done, bad), [], []
        if written is not None:
            written[0].result()
            yield written[1]


@torch.inference_mode()
def encode(encoder: Encoder, images: Tensor, device: torch.device) -> Tensor:
    """The features of prepared images, (B, F) float32 on the device.

    Raises:
        ValueError: an encoder that does not pool, or whose features are not finite.
    """
    images = images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalise_images(images, encoder.mean, encoder.std)
    features = encoder.module(images.to(memory_format=torch.channels_last)).float()
    if features.ndim != 2:
        raise ValueError(
            "the encoder must pool to shape (batch, features), got "
            f"{tuple(features.shape)}; remove global_pool from its model_args."
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            "the encoder must give finite features, and some are not; compute in float32, without "
            "--bf16 and --mixed_precision, or choose another checkpoint."
        )
    return features


class _Views(Dataset[Batch]):
    """Batches of rows as the encoder's own evaluation views."""

    def __init__(
        self, splits: dict[str, ImageSplit], batches: list[tuple[Part, range]], encoder: Encoder
    ) -> None:
        self.splits, self.batches, self.prepare = splits, batches, encoder.prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        part, wanted = self.batches[index]
        rows, paths, images, bad = [], [], [], []
        for sample in self.splits[part.split].try_read(wanted):
            if isinstance(sample, BadImage):
                bad.append(sample)
                continue
            rows.append(sample.key)
            paths.append(sample.path)
            images.append(self.prepare(sample.content))
        return Batch(rows, paths, torch.stack(images) if images else None, bad)


def _write(
    part: Part,
    split: ImageSplit,
    batches: list[Batch],
    features: NDArray[np.floating[Any]],
    root: str,
) -> None:
    """The features of a part as parquet, whole or not at all."""
    rows = [row for batch in batches for row in batch.rows]
    paths = [path for batch in batches for path in batch.paths]
    width = features.shape[1]
    ids = [_image_id(row, path, root) for row, path in zip(rows, paths, strict=True)]
    # from_dict would take each number by itself
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), width)
    arrays = [pa.array(rows, pa.int64()), pa.array(ids, pa.string()), embedding]
    kinds: dict[str, Any] = {
        "row": datasets.Value("int64"),
        "image_id": datasets.Value("string"),
        "embedding": datasets.List(datasets.Value(str(features.dtype)), length=width),
    }
    if split.labels is not None:
        arrays.append(pa.array(split.labels[torch.tensor(rows, dtype=torch.long)].numpy()))
        names = list(split.label_names)
        kinds["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    table = pa.Table.from_arrays(arrays, schema=datasets.Features(kinds).arrow_schema)
    write_part(part.file, table)


def _image_id(row: int, path: str | None, root: str) -> str:
    """Never a path of this machine."""
    if path is None:
        return str(row)
    archive, path = zip_and_name(path)
    if archive is not None:
        several = Path(root).is_dir()
        return f"{_image_id(row, archive, root)}/{path}" if several else path
    if Path(path).is_absolute():
        folder = Path(root).resolve()
        inside = Path(path).is_relative_to(folder)
        return Path(path).relative_to(folder).as_posix() if inside else Path(path).name
    return path


Encode = Callable[[Tensor], Tensor]


def normalise_images(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """uint8 images (B, 3, S, S) as the float32 the encoder was trained on.

    Args:
        mean: per channel; of a tensor on the images' device nothing has to be copied there.
        std: likewise.
    """
    shape = (1, -1, 1, 1)
    centre = torch.as_tensor(mean, device=images.device).view(shape)
    width = torch.as_tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - centre) / width


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Pooled features of every image, with the encoder in eval mode for as long as it takes.

    Args:
        encoder: gives (B, F) for (B, 3, S, S); a bare timm module with num_classes=0, say.
        batches: uint8 tensors (B, 3, S, S).
        mean: per channel, of the encoder's preprocessing; likewise std.
        autocast: the context in which the encoder sees a batch, entered anew for each: torch keeps
            weights of lower precision until it is left.

    Returns:
        (N, F) float32 on the device.
    """
    training = encoder.training
    encoder.eval()
    centre, width = (torch.tensor(values, device=device) for values in (mean, std))
    features = []
    try:
        for images in batches:
            x = normalise_images(on_device(images, torch.device(device)), centre, width)
            with autocast():
                features.append(encoder(x).float())
    finally:
        encoder.train(training)
    return torch.cat(features)


def pixel_features(batches: Iterable[Tensor], *, device: torch.device | str = "cpu") -> Tensor:
    """The images themselves as features (N, 3 S S): what an encoder has to beat."""
    return torch.cat([images.to(device).flatten(1).float() / 255 - 0.5 for images in batches])
