"""Small images that stay in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.runtime.console import warn
from vicreg_hf.runtime.distributed import (
    agree,
    failing_together,
    gather_objects,
    rank,
    world_size,
)

SMALL_IMAGE = 64
"""Side in pixels up to which images are taken at their own size, with the `cifar` views."""
MEMORY_BUDGET = 4 * 2**30
"""Bytes of decoded pixels that the processes of a machine keep in memory at most; where they cannot
share memory, that each of them keeps."""


def load_in_memory(
    split: ImageSplit,
    budget: int = MEMORY_BUDGET,
    bad: BadImages | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
) -> Tensor | None:
    """Decode a whole split, or some rows; what cannot be used is replaced and added to `bad`.

    Every process must call this. One on each machine decodes, and the others map its memory, which
    has no name and is freed with the last of them, however they end.

    Returns:
        (N, C, H, W) uint8, or in every process None, where sizes differ or the pixels exceed the
        budget in bytes.
    """
    chosen = range(len(split)) if rows is None else rows.tolist()
    decode = _decode if world_size() == 1 else _decode_once
    images, unusable = decode(split, chosen, budget)
    if bad is not None and images is not None:
        bad.add(unusable)
    return images


def _decode(
    split: ImageSplit,
    chosen: Sequence[int],
    budget: int,
    allocate: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor | None, list[BadImage]]:
    """See `load_in_memory`.

    Args:
        allocate: gives so many bytes, (bytes,) uint8; by default memory of this process alone.
    """
    (first,), _ = split.read_or_replace(chosen[:1])
    if first.numel() * len(chosen) > budget:
        return None, []
    size = first.numel() * len(chosen)
    room = torch.empty(size, dtype=torch.uint8) if allocate is None else allocate(size)
    images = room.view(len(chosen), *first.shape)
    unusable: list[BadImage] = []
    step = 256
    for start in range(0, len(chosen), step):
        decoded, replaced = split.read_or_replace(chosen[start : start + step])
        if any(image.shape != first.shape for image in decoded):
            return None, []
        torch.stack(decoded, out=images[start : start + step])
        unusable += replaced
    return images, unusable


class _Offer(NamedTuple):
    """What the process that has decoded tells the others of its machine."""

    shape: tuple[int, ...] | None
    """(N, C, H, W), or None where the images are not kept."""
    unusable: list[BadImage]
    file: str | None
    """Where the pixels are mapped from, or None where they cannot be shared."""
    identity: tuple[int, int]
    """Device and inode of that file."""

    def map(self) -> Tensor:
        """The pixels, in the memory of the process that has decoded.

        Raises:
            OSError: this process may not, or does not see that process.
        """
        if self.file is None or self.shape is None:
            raise OSError("this system has no memory that is shared without a name")
        # first, as to open a file that is not ours, such as a device, may have effects
        if _identity(os.stat(self.file)) != self.identity:
            raise OSError(f"{self.file} is another file in this process")
        opened = os.open(self.file, os.O_RDWR)
        try:
            return _mapped(opened, math.prod(self.shape)).view(self.shape)
        finally:
            os.close(opened)


def _decode_once(
    split: ImageSplit, chosen: Sequence[int], budget: int
) -> tuple[Tensor | None, list[BadImage]]:
    """`_decode` in the first process of each machine, for all of its processes."""
    machines = gather_objects([_machine()])
    leader, cpu = machines.index(machines[rank()]), torch.device("cpu")
    images, unusable, offer = None, [], None
    with ExitStack() as until_mapped:
        with failing_together(cpu):
            if leader == rank():
                files: list[int] = []
                images, unusable = _decode(split, chosen, budget, partial(_allocate_shared, files))
                for file in files:
                    until_mapped.callback(os.close, file)
                shape = None if images is None else tuple(images.shape)
                where = [(f"/proc/{os.getpid()}/fd/{f}", _identity(os.fstat(f))) for f in files]
                offer = _Offer(shape, unusable, *(where[0] if where else (None, (0, 0))))
        offer = gather_objects([offer])[leader]
        assert offer is not None
        with failing_together(cpu):  # and wait for all
            if leader != rank() and offer.shape is not None:
                unusable = offer.unusable
                try:
                    images = offer.map()
                except OSError as error:
                    images, _ = _decode(split, chosen, budget)
                    warn(
                        "the processes of this machine do not share decoded images, so each keeps "
                        f"its own copy of {math.prod(offer.shape) / 2**20:.0f} MiB: {error}.",
                        everywhere=True,
                    )
    # on another machine, or in a copy of its own, a file may have failed to be read
    return (None, []) if agree(images is None)[0] else (images, unusable)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _machine() -> str:
    """The same in processes that see each other; of its own where that cannot be found out."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return f"process {rank()}"


def _allocate_shared(files: list[int], size: int) -> Tensor:
    """So many bytes, (size,) uint8, of a file without a name, which is added to files.

    It is not bound to the size of /dev/shm, and ends with the last process that has it. Where there
    can be none, they are of this process alone.
    """
    try:
        file = os.memfd_create("vicreg_hf")
    except (AttributeError, OSError):  # not Linux, or it is not allowed
        return torch.empty(size, dtype=torch.uint8)
    try:
        os.ftruncate(file, size)
        mapped = _mapped(file, size)
    except OSError:  # such as for ulimit -f
        os.close(file)
        return torch.empty(size, dtype=torch.uint8)
    files.append(file)
    return mapped


def _mapped(file: int, size: int) -> Tensor:
    return torch.frombuffer(mmap(file, size), dtype=torch.uint8)


def common_side(split: ImageSplit) -> int | None:
    """The side of the images if they look small, square and alike; else None.

    Every process must call this. The main one looks, so that all get the same.
    """
    side = None
    with failing_together(torch.device("cpu")):
        if rank() == 0:
            images, _ = split.read_or_replace(range(min(8, len(split))))
            height, width = images[0].shape[-2:]
            alike = all(image.shape == images[0].shape for image in images)
            side = height if alike and height == width <= SMALL_IMAGE else None
    return gather_objects([side])[0]
