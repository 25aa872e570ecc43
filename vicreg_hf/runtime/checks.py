"""Numbers and widths as callers give them, and what to say of those that cannot be."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, of Python or NumPy."""
    return is_whole(value) or isinstance(value, (float, np.floating))


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuse what is not a finite number of at least 0, or with `positive` one above 0."""
    # a NaN compares as false
    if not (is_number(value) and 0 <= value < math.inf and (value > 0 or not positive)):
        rule = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name} must be a finite number {rule}, got {value!r}.")


def read_widths(name: str, given: Any) -> list[int]:
    """Widths of layers, given as integers or as these joined by '-'.

    Raises:
        ValueError: something else, or a width below 1.
    """
    widths: list[Any] = []
    right = isinstance(given, Iterable) and not isinstance(given, (bytes, dict))
    if isinstance(given, str):
        parts = given.split("-")
        right = all(part.strip().isdecimal() for part in parts)
        widths = [int(part) for part in parts] if right else []
    elif right:
        widths = list(given)
    if not right or not all(is_whole(width) and width > 0 for width in widths):
        raise ValueError(
            f"{name} must be positive widths, as [8192, 8192, 8192], or these joined by '-', as "
            f"8192-8192-8192, got {given!r}."
        )
    return [int(width) for width in widths]


def fold_name(name: str) -> str:
    """A name of a file, the same for all spellings that Windows or macOS takes for one.

    These differ in capitals, in how accents are written, and in what stands between folders.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).replace(
        "\\", "/"
    )


def one_line(error: BaseException) -> str:
    """The message of an error that others raised, without line breaks, for a sentence of ours."""
    return " ".join(str(error).split())
