"""Images that cannot be used: logged, counted, and too many of them are the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vicreg_hf.data.columns.base import BadImage, path_of
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.runtime.randomness import Stream, words

LEAST_SEEN = 1000
"""Images to have seen before their share is judged; or all, of fewer."""


class BadImages:
    """The images of one run that could not be used, each counted once.

    Processes and workers find them apart, and `agree` brings together what they have found.

    Args:
        num_images: of the data; None where that is not known.
        max_fraction: share of bad ones that is tolerated.
        path: a file with a line of JSON for each; written by one process.
        fate: what became of them, for the warning.
    """

    def __init__(
        self,
        num_images: int | None,
        max_fraction: float,
        path: Path | None,
        fate: str = "replaced",
    ) -> None:
        self.num_images, self.max_fraction, self.path = num_images, max_fraction, path
        self.fate = fate
        self._known: dict[tuple[Any, ...], BadImage] = {}
        self._new: list[BadImage] = []

    def __len__(self) -> int:
        return len(self._known)

    @property
    def found(self) -> list[BadImage]:
        """Those that all processes know of."""
        return list(self._known.values())

    def add(self, images: Iterable[BadImage]) -> None:
        """What this process has found."""
        self._new += images

    def agree(
        self,
        gather: Callable[[list[Any]], list[Any]] = list,
        *,
        seen: int = 0,
        write: bool = True,
        say: Callable[[str], object] = print,
    ) -> None:
        """Learn what all processes have found; every process must call this.

        Args:
            gather: from a process's list to those of all processes, one after the other.
            seen: images read so far, by all processes.
            write: whether this process writes the file.
            say: told of the first, and of how many there are.

        Raises:
            ImageError: more than `max_fraction` of those seen are bad.
        """
        own, self._new = self._new, []  # to which another thread may add meanwhile
        found = {image.identity: image for image in (BadImage(*each) for each in gather(own))}
        fresh = {key: image for key, image in found.items() if key not in self._known}
        if not fresh:
            return
        self._known |= fresh
        if write and self.path is not None:
            with self.path.open("a") as file:
                file.writelines(json.dumps(image._asdict()) + "\n" for image in fresh.values())
        first = next(iter(fresh.values()))
        listed = f" They are listed in {self.path}." if self.path else ""
        say(
            f"warning: {len(self)} images could not be used and were {self.fate}; the latest: "
            f"{first.place}: {first.reason}{listed}"
        )
        total = seen if self.num_images is None else min(seen, self.num_images)
        least = LEAST_SEEN if self.num_images is None else min(LEAST_SEEN, self.num_images)
        judged = max(total, least)
        if len(self) > self.max_fraction * judged:
            raise ImageError(
                f"at most max_bad_fraction={self.max_fraction} of the images may be unusable, got "
                f"{len(self)} of {judged}; the latest: {first.place}: {first.reason}{listed} "
                "Mend or remove them, or raise --max_bad_fraction."
            )

    def forget(self) -> None:
        """Remove the file of an earlier run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def recall(self) -> None:
        """Take up the file of the run that is resumed."""
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text().splitlines():
            try:
                image = BadImage(**json.loads(line))
            except (ValueError, TypeError):  # torn by a kill
                continue
            self._known[image.identity] = image


def check_share(bad: int, num_images: int, max_fraction: float) -> None:
    """Judge what earlier runs have left out too, which may have allowed more, or failed.

    Raises:
        ImageError: more than `max_fraction` of the images are bad.
    """
    if bad > max_fraction * num_images:
        raise ImageError(
            f"at most max_bad_fraction={max_fraction} of the images may be unusable, got {bad} of "
            f"{num_images}; mend or remove them, or raise --max_bad_fraction."
        )


MAX_REPLACEMENTS = 100
"""Samples tried in the place of one that cannot be used."""

T = TypeVar("T", covariant=True)


class Readable(Protocol[T]):
    """Encoded samples by row number."""

    def __len__(self) -> int: ...

    def place(self, row: int) -> str:
        """A row, as a sentence names it."""
        ...

    def cells(self, rows: Sequence[int]) -> list[Any]:
        """What the data set holds of some rows."""
        ...

    def decode(self, cell: Any) -> T:
        """The sample of a cell; an ImageError where it cannot be used."""
        ...


def read_or_replace(samples: Readable[T], rows: Sequence[int]) -> tuple[list[T], list[BadImage]]:
    """Decode some rows, and another sample in the place of one that cannot be used.

    Which one is a function of the row alone.

    Returns:
        One sample per row, and what could not be used.

    Raises:
        ImageError: nor could any of `MAX_REPLACEMENTS` others.
    """
    found: list[T] = []
    bad: list[BadImage] = []
    for row, cell in zip(rows, samples.cells(rows), strict=True):
        try:
            found.append(samples.decode(cell))
        except ImageError as error:
            bad.append(BadImage(int(row), _path(cell), str(error)))
            found.append(_replacement(samples, int(row), bad))
    return found, bad


def _replacement(samples: Readable[T], row: int, bad: list[BadImage]) -> T:
    first = bad[-1].reason
    for attempt in range(MAX_REPLACEMENTS):
        drawn = words([row], 1, seed=0, epoch=attempt, stream=Stream.REPLACEMENT)
        other = int(drawn[0, 0]) % len(samples)
        (cell,) = samples.cells([other])
        try:
            return samples.decode(cell)
        except ImageError as error:
            bad.append(BadImage(other, _path(cell), str(error)))
    raise ImageError(
        f"{samples.place(row)}: {first} Nor could {MAX_REPLACEMENTS} others be used in its place."
    )


def _path(cell: Any) -> str | None:
    """Of the file that a cell, or the first of a pair of them, is from."""
    return path_of(cell[0] if isinstance(cell, tuple) else cell)
