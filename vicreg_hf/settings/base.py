"""How settings are declared: a type that says which values they may hold, and a sentence."""

from __future__ import annotations

import ast
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

from vicreg_hf.runtime.checks import is_number, is_whole, range_text, read_range


class Limit(NamedTuple):
    """The values that a setting may hold, in its type: words for a sentence, and a test."""

    rule: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Limit("positive", lambda n: n > 0)]
WholeFromZero = Annotated[int, Limit("at least 0", lambda n: n >= 0)]
Positive = Annotated[float, Limit("positive", lambda x: x > 0)]
NotNegative = Annotated[float, Limit("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Limit("between 0 and 1", lambda x: 0 <= x <= 1)]
PositiveShare = Annotated[float, Limit("above 0 and at most 1", lambda x: 0 < x <= 1)]


def one_of(*choices: str) -> Limit:
    """The texts that a setting may hold."""
    rule = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
    return Limit(rule, choices.__contains__)


@dataclass(frozen=True)
class Settings:
    """Settings that are checked when they are made, and do not change afterwards.

    Numbers of NumPy become Python's, paths become strings.

    Raises:
        ValueError: a value of another type than declared, or outside its limits.
    """

    command: ClassVar[str] = ""
    """The command whose flags they are."""
    recipe_folder: ClassVar[str] = ""
    """The folder of `vicreg_hf/recipes` that holds recipes of them."""
    usual: ClassVar[tuple[str, ...]] = ()
    """Settings that --help lists, those most runs need; --help all lists every one."""
    several: ClassVar[tuple[str, ...]] = ()
    """Settings whose flag takes several words, which are joined by commas."""
    headings: ClassVar[dict[str, str]] = {}
    """Headings of --help, each by the first setting below it: a setting stands under the heading of
    the one that is declared before it."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for f in fields(self):
            self._fill(**{f.name: _checked(f, getattr(self, f.name), hints[f.name])})

    def _read_range(self) -> None:
        """Keep `value_range` as text, however it was given."""
        limits = read_range("value_range", getattr(self, "value_range"))  # noqa: B009
        self._fill(value_range=None if limits is None else range_text(limits))

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
    if str in kinds and isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None:
        return value
    if kinds <= {int, float, bool, NoneType}:
        value = _number(f.name, value, kinds)
    finite = not isinstance(value, float) or math.isfinite(value)
    for limit in limits:
        if not (finite and limit.holds(value)):
            rule = limit.rule if finite else f"{limit.rule} and finite"
            remedy = "; leave it out for none" if f.default is None else ""
            raise ValueError(f"{f.name} must be {rule}, got {value!r}{remedy}.")
    return value


def _number(name: str, value: Any, kinds: set[Any]) -> bool | int | float:
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
    return kind(value)


def descriptions(settings: type[Settings]) -> dict[str, str]:
    """The sentences below the fields of a class of settings, by field.

    They are read from its source, as Python keeps none; without the source there are none.
    """
    found: dict[str, str] = {}
    for kind in settings.__mro__[:-1]:
        try:
            (tree,) = ast.parse(inspect.getsource(kind)).body
        except OSError:
            continue
        for field, below in pairwise(getattr(tree, "body", [])):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                name, text = ast.unparse(field.target), ast.literal_eval(below.value)
                found.setdefault(name, " ".join(text.split()))
    return found
