"""What an earlier run or evaluation has written where a later one writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path


def set_aside(directory: Path, names: Iterable[str], say: Callable[[str], object]) -> None:
    """Move those of some files and folders that are there into one called earlier-N, and say so."""
    found = [name for name in names if (directory / name).exists()]
    if not found:
        return
    number = next(n for n in itertools.count(1) if not (directory / f"earlier-{n}").exists())
    place = directory / f"earlier-{number}"
    place.mkdir()
    for name in found:
        (directory / name).rename(place / name)
    say(f"What was in {directory} before is now in {place}: {', '.join(found)}.")
