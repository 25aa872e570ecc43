"""How settings are declared: fields with a default, a help text and the values they may have."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from vicreg_hf.runtime.checks import is_number, is_whole

REQUIRED: Any = MISSING
"""In the place of a default: the setting must be given."""


@dataclass(frozen=True)
class Limits:
    """The numbers that a setting may hold, all finite; at most `at_most` goes with a lower end."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is within the limits."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        if self.at_most is None:
            return "positive" if self.above == 0 else f"at least {self.at_least}"
        if self.at_least is None:
            return f"above {self.above} and at most {self.at_most}"
        return f"between {self.at_least} and {self.at_most}"


Count = Annotated[int, Limits(above=0)]
WholeFromZero = Annotated[int, Limits(at_least=0)]
Positive = Annotated[float, Limits(above=0)]
NotNegative = Annotated[float, Limits(at_least=0)]
Share = Annotated[float, Limits(at_least=0, at_most=1)]
PositiveShare = Annotated[float, Limits(above=0, at_most=1)]


def setting(
    default: Any, meaning: str, *, choices: Sequence[str] = (), kw_only: Any = MISSING
) -> Any:
    """A field of a class of `Settings`; its type says which numbers it may hold.

    Args:
        default: its value where none is given, or `REQUIRED`.
        meaning: the text of --help, in which a percent sign is doubled.
        choices: the texts it may hold.
        kw_only: whether it is no positional argument in Python, if not as its class says.
    """
    metadata = {"help": meaning, "choices": tuple(choices)}
    return field(default=default, kw_only=kw_only, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Settings that are checked when they are made, and do not change afterwards.

    Numbers of NumPy become Python's, paths become strings.

    Raises:
        ValueError: a value of another type than declared, or outside its limits.
    """

    script: ClassVar[str] = ""
    """The script whose flags they are."""
    recipe_folder: ClassVar[str] = ""
    """The folder of `vicreg_hf/recipes` that holds recipes of them."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for f in fields(self):
            self._fill(**{f.name: _checked(f, getattr(self, f.name), hints[f.name])})

    def _fill(self, **values: Any) -> None:
        """Set fields while the object is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _checked(f: Field[Any], value: Any, hint: Any) -> Any:
    """A value as its field declares it, a number of Python or a text.

    Raises:
        ValueError: it cannot be.
    """
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    limits = [part.__metadata__[0] for part in parts if get_origin(part) is Annotated]
    kinds = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
    choices = f.metadata.get("choices")
    if choices and value is not None and value not in choices:
        rule = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        raise ValueError(f"{f.name} must be {rule}, got {value!r}.")
    if str in kinds and isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or not kinds <= {int, float, bool, NoneType}:
        return value
    if bool in kinds:
        kind, rule, right = bool, "True or False", isinstance(value, (bool, np.bool))
    elif float in kinds:
        kind = int if is_whole(value) else float
        rule, right = "a number", is_number(value)
    else:
        kind, rule, right = int, "a whole number", is_whole(value)
    if not right:
        more = " or None" if NoneType in kinds else ""
        raise ValueError(f"{f.name} must be {rule}{more}, got {value!r}.")
    for limit in limits:
        if not limit.hold(value):
            finite = "" if math.isfinite(value) else " and finite"
            raise ValueError(f"{f.name} must be {limit}{finite}, got {value}.")
    return kind(value)
