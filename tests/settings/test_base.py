"""How settings are declared and checked, whichever script they belong to."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from vicreg_hf import EvaluationArguments, PretrainingArguments
from vicreg_hf.settings.base import (
    Count,
    NotNegative,
    Positive,
    PositiveShare,
    Settings,
    Share,
    WholeFromZero,
    one_of,
)
from vicreg_hf.settings.extraction import ExtractionArguments
from vicreg_hf.settings.finetuning import FinetuneSettings


@dataclass(frozen=True)
class Example(Settings):
    """A setting of every kind."""

    place: str
    """Where."""
    count: Count | None = None
    """How many."""
    rate: Positive = 1.0
    """How fast."""
    decay: NotNegative = 0.0
    """How much less."""
    seed: WholeFromZero = 0
    """Which."""
    share: Share = 0.5
    """Which part."""
    part: PositiveShare = 1
    """Which part that is not empty."""
    mode: Annotated[str, one_of("one", "two", "three")] = "one"
    """How."""
    flag: bool | None = None
    """Whether."""


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"count": 0}, "count must be positive, got 0."),
        ({"rate": math.inf}, "rate must be positive and finite, got inf."),
        ({"decay": -1}, "decay must be at least 0, got -1."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"share": 2.0}, "share must be between 0 and 1, got 2.0."),
        ({"part": 0}, "part must be above 0 and at most 1, got 0."),
        ({"mode": "four"}, "mode must be one of one, two, three, got 'four'."),
        ({"count": 32.0}, "count must be a whole number or None, got 32.0."),
        ({"count": True}, "count must be a whole number or None, got True."),
        ({"rate": "1e-4"}, "rate must be a number, got '1e-4'."),
        ({"flag": 1}, "flag must be True or False or None, got 1."),
    ],
)
def test_a_value_outside_its_declaration_is_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Example("here", **values)
    assert str(refused.value) == rule


def test_numbers_of_numpy_and_paths_become_pythons() -> None:
    values: Any = {"count": np.int64(64), "rate": np.float32(0.25), "flag": np.bool(False)}
    example = Example(Path("a") / "b", **values)  # pyright: ignore[reportArgumentType]
    assert (example.place, example.count, example.rate, example.flag) == ("a/b", 64, 0.25, False)
    assert [type(getattr(example, name)) for name in values] == [int, float, bool]
    assert type(Example("", decay=3).decay) is int


@pytest.mark.parametrize(
    "settings",
    [
        PretrainingArguments(), EvaluationArguments("m", "d"), ExtractionArguments("m", "d", "o"),
        FinetuneSettings(),
    ],
    ids=lambda settings: type(settings).__name__,
)  # fmt: skip
def test_settings_do_not_change_and_are_checked_when_they_are_replaced(settings: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        settings.batch_size = 8
    assert replace(settings) == settings
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        replace(settings, batch_size=0)
