"""Numbers and widths as callers give them, and what to say of those that cannot be."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

PATIENCE = 20.0
"""Seconds in which the Hub must say whether it has a repository."""


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


def check_there(name: str, path: str) -> None:
    """Raise a ValueError where the file or folder that a setting names is not there."""
    if not os.path.exists(path):
        raise ValueError(f"{name} must be a file or folder that is there, got {path}.")


def read_widths(name: str, given: Any) -> list[int]:
    """Widths of layers, given as integers or as these joined by '-'.

    Raises:
        ValueError: something else, or a width below 1.
    """
    widths: list[Any] = [0]
    if isinstance(given, str):
        widths = [int(part) if part.strip().isdecimal() else 0 for part in given.split("-")]
    elif isinstance(given, Iterable) and not isinstance(given, (bytes, dict)):
        widths = list(given)
    if not all(is_whole(width) and width > 0 for width in widths):
        raise ValueError(
            f"{name} must be positive widths, as [8192, 8192, 8192], or these joined by '-', as "
            f"8192-8192-8192, got {given!r}."
        )
    return [int(width) for width in widths]


def read_range(name: str, given: Any) -> tuple[float, float] | None:
    """Two numbers, given as a sequence or as text joined by a comma, the smaller one first.

    Raises:
        ValueError: something else.
    """
    if given is None:
        return None
    try:
        low, high = map(float, given.split(",") if isinstance(given, str) else given)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"{name} must be two finite numbers joined by a comma, the smaller first, as "
            f"-1000,400, got {given!r}."
        )
    return low, high


def range_text(limits: Sequence[float]) -> str:
    """Two numbers as `read_range` reads them."""
    return ",".join(str(int(x)) if float(x).is_integer() else repr(float(x)) for x in limits)


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


def fault_at_hub(name: str, kind: str) -> str | None:
    """Ask the Hub once for a repository: a clause on why it does not give it; None where it does.

    Args:
        name: `org/name`, or `name`.
        kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    noun = {"dataset": "data set"}.get(kind, kind)
    if constants.HF_HUB_OFFLINE:
        return f"the Hub is not asked for a {noun} of that name, as HF_HUB_OFFLINE is set"
    try:
        HfApi(library_name="vicreg_hf").repo_info(name, repo_type=kind, timeout=PATIENCE)
    except GatedRepoError:
        return None  # loaders tell what to do
    except RepositoryNotFoundError:
        return (
            f"the Hub has no {noun} {name}, or shows it only with an access token that may read it"
        )
    except Exception as error:  # the client's errors have no common class
        return f"the Hub, asked for a {noun} {name}, does not answer: {one_line(error)[:200]}"
    return None
