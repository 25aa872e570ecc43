"""Columns that a second branch sees: found, and those of texts and of vectors read."""

from __future__ import annotations

import pickle
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from paired import word_tokenizer

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.second_column import find_second_column, open_second_column
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.vectors import VectorColumn

FLOAT, TEXT = datasets.Value("float16"), datasets.Value("string")
FEATURES = datasets.Features(
    {
        "text": TEXT, "texts": datasets.List(datasets.Value("large_string")),
        "lists": datasets.LargeList(TEXT), "sound": datasets.Audio(), "bytes":
        datasets.Value("binary"), "vector": datasets.LargeList(FLOAT), "number": FLOAT,
        "nested": datasets.List(datasets.List(TEXT)), "ids": datasets.List(datasets.Value("int8")),
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("modality", "names"),
    [
        ("text", ["text", "texts", "lists"]),
        ("embedding", ["vector"]),
        ("audio", ["sound", "bytes"]),
    ],
)
def test_second_columns_are_found_and_others_refused(modality: str, names: list[str]) -> None:
    for name in names:
        assert find_second_column(FEATURES, modality, name) == name
    only = None if modality == "text" else names[0]
    listed = only or ", ".join(names)
    for name in {*FEATURES, "absent"}.difference(names):
        message = f"of {modality}, got '{name}'; columns of {modality}: {listed}; all: text, texts"
        with pytest.raises(ValueError, match=message):
            find_second_column(FEATURES, modality, name)
    if only:
        assert find_second_column(FEATURES, modality, None) == only
    else:
        with pytest.raises(ValueError, match=r"must be given .* got 3; columns of text: t"):
            find_second_column(FEATURES, modality, None)
    with pytest.raises(ValueError, match=r"^prime_column must be given .* holds images, got 0"):
        open_second_column(datasets.Dataset.from_dict({"a": [1]}), "image", None, {})


def test_images_of_a_second_column_have_a_range_of_rows_all_over_the_table() -> None:
    features = datasets.Features({"image": datasets.Array2D((1, 1), "int16")})
    rows = {"image": [[[n]] for n in range(300)]}
    table = datasets.Dataset.from_dict(rows, features)
    column = open_second_column(table, "image", None, {}, channels=1)
    assert column.value_range == (0, 299)  # pyright: ignore[reportAttributeAccessIssue]


# --- texts

TOKENIZER = word_tokenizer()
CAPTIONS = ["a small red circle at the top left", "a large blue cross", "the middle"]


def test_captions_become_tokens_that_read_as_they_do() -> None:
    table = datasets.Dataset.from_dict({"caption": CAPTIONS, "other": CAPTIONS})
    column = pickle.loads(pickle.dumps(TextColumn("caption", TOKENIZER)))
    prepared = column.prepare(table)
    assert prepared.column_names == ["caption"]
    tokens = column.batch([column.decode(cell) for cell in prepared["caption"]], range(3), 0, 0)
    assert set(tokens) <= {"input_ids", "attention_mask", "token_type_ids"}
    assert all(value.dtype == torch.int64 for value in tokens.values())
    assert TOKENIZER.batch_decode(tokens["input_ids"], skip_special_tokens=True) == CAPTIONS
    assert tokens["attention_mask"].sum(1).tolist() == [10, 6, 4]  # padded to the longest


def test_texts_are_cut_to_max_length() -> None:
    short = TextColumn("caption", TOKENIZER, max_length=5)
    tokens = short.batch([(text,) for text in CAPTIONS], range(3), 0, 0)
    assert tokens["attention_mask"].sum(1).tolist() == [5, 5, 4]
    assert tokens["input_ids"][0, -1] == TOKENIZER.sep_token_id
    with pytest.raises(ValueError, match="must leave room beside the 2 special tokens, got 2"):
        TextColumn("caption", TOKENIZER, max_length=2)


def test_one_of_several_captions_is_drawn_by_row_epoch_and_seed() -> None:
    column = TextColumn("captions", TOKENIZER)
    words = ("red", "green", "blue", "white", "cyan")
    names = [TOKENIZER.get_vocab()[word] for word in words]

    def draws(rows: range, epoch: int = 0, seed: int = 0) -> list[int]:
        items = [column.decode(list(words))] * len(rows)
        ids = column.batch(items, rows, epoch, seed)["input_ids"][:, 1]
        return [names.index(int(i)) for i in ids]

    first = draws(range(1000))
    assert draws(range(300, 310)) == first[300:310]  # whatever the batch
    counts = torch.bincount(torch.tensor(first), minlength=5)
    assert counts.min() > 150  # of 200 expected, with a standard deviation of 13
    for other in (draws(range(1000), epoch=1), draws(range(1000), seed=1)):
        alike = sum(a == b for a, b in zip(first, other, strict=True))
        assert 140 < alike < 260


@pytest.mark.parametrize("cell", [None, " \t\n", [], [None, " "]])
def test_captions_that_say_something_are_kept_and_a_cell_without_one_is_bad(cell: Any) -> None:
    column = TextColumn("caption", TOKENIZER)
    assert column.decode("a cross") == ("a cross",)
    assert column.decode(["a", "", None, " \n", "b"]) == ("a", "b")
    with pytest.raises(ImageError, match="text"):
        column.decode(cell)


# --- vectors


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("length", [-1, 3])
def test_any_float_type_becomes_float32_as_it_is(dtype: str, length: int) -> None:
    features = datasets.Features({"v": datasets.List(datasets.Value(dtype), length=length)})
    cells = np.array([[0.5, -2.0, 3.25], [1.0, 0.0, -8.0]], dtype=dtype)
    table = datasets.Dataset.from_dict({"v": list(cells)}, features=features)
    found = VectorColumn.measure(table, "v")
    assert found == VectorColumn("v", 3)
    column = pickle.loads(pickle.dumps(found))
    batch = column.batch([column.decode(cell) for cell in column.prepare(table)["v"]], [0, 1], 0, 0)
    assert batch.dtype == torch.float32
    assert batch.tolist() == cells.tolist()


def test_an_undeclared_width_is_that_of_the_first_usable_vectors() -> None:
    features = datasets.Features({"v": datasets.List(datasets.Value("float32"))})
    cells = [None, [], [float("nan")], [1.0, 2.0], [1.0, 2.0, 3.0]]
    table = datasets.Dataset.from_dict({"v": cells}, features=features)
    assert VectorColumn.measure(table, "v").width == 2
    with pytest.raises(ValueError, match="must hold vectors, got none"):
        VectorColumn.measure(table.select(range(3)), "v")
    mixed = datasets.Dataset.from_dict({"v": [[1.0] * k for k in (1, 2, 3, 4)]}, features=features)
    with pytest.raises(ValueError, match="of one width, got 1 to 4 numbers"):
        VectorColumn.measure(mixed, "v")


def test_what_is_no_finite_vector_of_that_width_is_bad() -> None:
    for cell in (
        None, [], [1.0, 2.0], [1.0, float("inf"), 2.0], [1.0, None, 2.0], [[1.0, 2.0, 3.0]],
        [1e39, 0.0, 0.0],
    ):  # fmt: skip
        with pytest.raises(ImageError, match="vector"):
            VectorColumn("v", 3).decode(cell)
