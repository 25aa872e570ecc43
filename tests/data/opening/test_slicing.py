"""Parts of splits, as settings name them."""

from __future__ import annotations

import re

import pytest
from datasets import Dataset

from vicreg_hf.data.opening.slicing import add_parts, share_images

TABLES = {
    "train": Dataset.from_dict({"row": list(range(10))}),
    "test": Dataset.from_dict({"row": list(range(10, 15))}),
    "b-w[1]": Dataset.from_dict({"row": [20, 21]}),
}


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ("train[:30%]", [0, 1, 2]),
        ("train[30%:]", list(range(3, 10))),
        ("train[:25%]", [0, 1]),
        ("train[-3:]", [7, 8, 9]),
        ("train[:90]", list(range(10))),
        ("train+test", list(range(15))),
        ("test[:1]+train[9:]", [10, 9]),
        ("b-w[1]", [20, 21]),
    ],
)
def test_a_part_holds_the_rows_that_it_names(wanted: str, rows: list[int]) -> None:
    found = add_parts(TABLES, train_split=wanted, eval_split=None)
    assert list(found[wanted]["row"]) == rows
    assert set(found) == {*TABLES, wanted}


OF_ONE = (
    "must be one of train, test, b-w[1], part of one such as train[:90%], or several joined by +, "
)


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [
        ("dev", OF_ONE), ("train[%]", OF_ONE), ("train[:200%]", OF_ONE), ("dev[:5]", OF_ONE),
        ("", OF_ONE), ("train+", OF_ONE), ("train+train", "must name each image once, "),
        ("train[:5]+test+train[4:]", "must name each image once, "),
    ],
)  # fmt: skip
def test_what_names_no_part_is_answered_with_the_rule(wanted: str, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"eval_split {rule}got {wanted!r}")):
        add_parts(TABLES, train_split="train", eval_split=wanted)


def test_a_stream_has_no_parts() -> None:
    streams = {name: table.to_iterable_dataset() for name, table in TABLES.items()}
    assert add_parts(streams, train_split="train")["train"] is streams["train"]
    with pytest.raises(ValueError, match="train_split must be one whole split of a stream, got"):
        add_parts(streams, train_split="train[:50%]")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("train", "train", True),
        ("train", "test", False),
        ("train[:90%]", "train[90%:]", False),
        ("train[:90%]", "train[80%:]", True),
        ("train[:5]", "train[4:5]", True),
        ("train+test", "test[:1]", True),
        ("train[5:5]", "train", False),
    ],
)
def test_parts_that_overlap_share_images(one: str, other: str, expected: bool) -> None:
    added = add_parts(TABLES, train_split=one, eval_split=other)
    for tables in (TABLES, added):
        assert share_images(tables, one, other) is share_images(tables, other, one) is expected
