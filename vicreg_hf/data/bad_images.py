"""Images that cannot be used: logged, counted, and too many of them are the end of a run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError

LEAST_SEEN = 1000
"""Images to have seen before the share of bad ones is judged; all, if there are fewer."""


class BadImages:
    """The images of one run that could not be used, each row counted once.

    The images of streams have no rows, and nothing else that tells all of them apart: they are
    counted as often as they are read. Each process finds its own; `agree` brings them together.

    Args:
        num_images: length of the data; None where that is not known.
        max_fraction: share of bad ones that is tolerated.
        path: a file with a line of JSON for each; written by one process.
        fate: word for what became of them, in the warning.
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
        self._known: dict[int | str, BadImage] = {}
        self._new: list[BadImage] = []

    def __len__(self) -> int:
        return len(self._known)

    @property
    def found(self) -> list[BadImage]:
        """The bad images that all processes know of."""
        return list(self._known.values())

    @property
    def reasons(self) -> dict[str, int]:
        """How many there are by the reason, in words that name no file and no path."""
        heads = (re.split(r": |, got| \(", image.reason)[0].strip(". ") for image in self.found)
        return dict(Counter(heads).most_common())

    def add(self, images: Iterable[BadImage]) -> None:
        """Note what this process has found."""
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
            seen: images used so far, by all processes.
            write: whether this process writes the file.
            say: told of the first, and of how many there are.

        Raises:
            ImageError: more than `max_fraction` of those seen are bad.
        """
        own, self._new = self._new, []  # to which another thread may add meanwhile
        fresh = self._learn(BadImage(*each) for each in gather(own))
        if not fresh:
            return
        if write and self.path is not None:
            with self.path.open("a") as file:
                file.writelines(json.dumps(image._asdict()) + "\n" for image in fresh)
        first = fresh[0]
        listed = f" They are listed in {self.path}." if self.path else ""
        latest = f"; the latest: {first.place}: {first.reason.removesuffix('.')}.{listed}"
        say(f"warning: {len(self)} images could not be used and were {self.fate}{latest}")
        length = self.num_images or max(seen, LEAST_SEEN)
        total = min(max(seen, LEAST_SEEN), length)
        if first.row is None:
            total = max(seen + len(self), min(LEAST_SEEN, length))
        check_share(len(self), total, self.max_fraction, latest)

    def forget(self) -> None:
        """Remove the file of an earlier run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def recall(self) -> None:
        """Take up the file of the run that is resumed."""
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text().splitlines():
            with suppress(ValueError, TypeError):  # torn by a kill
                self._learn([BadImage(**json.loads(line))])

    def _learn(self, images: Iterable[BadImage]) -> list[BadImage]:
        """Take up those that are not known yet, and return them."""
        fresh = []
        for image in images:
            key = f"occurrence {len(self)}" if image.row is None else image.row
            if key not in self._known:
                self._known[key] = image
                fresh.append(image)
        return fresh


def check_share(bad: int, num_images: int, max_fraction: float, latest: str = "") -> None:
    """Make sure that few enough images are bad.

    Raises:
        ImageError: more than `max_fraction` of them are.
    """
    if bad > max_fraction * num_images:
        raise ImageError(
            f"at most max_bad_fraction={max_fraction} of the images may be unusable, got {bad} of "
            f"{num_images}{latest or '.'} Mend or remove them, or raise --max_bad_fraction."
        )
