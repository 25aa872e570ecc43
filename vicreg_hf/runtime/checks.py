"""Numbers and widths as callers give them, and what to say of those that cannot be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args, get_type_hints

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


def settle_kinds(settings: Any) -> None:
    """Bring the fields of a dataclass of settings to the types they declare.

    Numbers of NumPy become Python's, paths become strings.

    Raises:
        ValueError: no number where one must be, or neither True nor False.
    """
    for name, hint in get_type_hints(type(settings)).items():
        kinds: set[Any] = set(get_args(hint) or (hint,))
        value: Any = getattr(settings, name)
        if str in kinds and isinstance(value, os.PathLike):
            setattr(settings, name, os.fspath(value))
        if value is None or not kinds <= {int, float, bool, NoneType}:
            continue
        if bool in kinds:
            kind, rule, right = bool, "True or False", isinstance(value, (bool, np.bool))
        elif float in kinds:
            kind = int if is_whole(value) else float
            rule, right = "a number", is_number(value)
        else:
            kind, rule, right = int, "a whole number", is_whole(value)
        if not right:
            more = " or None" if NoneType in kinds else ""
            raise ValueError(f"{name} must be {rule}{more}, got {value!r}.")
        setattr(settings, name, kind(getattr(settings, name)))


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


def one_line(error: BaseException) -> str:
    """The message of an error that others raised, without line breaks, for a sentence of ours."""
    return " ".join(str(error).split())
