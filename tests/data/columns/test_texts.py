"""Columns of text."""

from __future__ import annotations

import pickle
from typing import Any

import datasets
import pytest
import torch
from paired import word_tokenizer

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.second_column import find_second_column
from vicreg_hf.data.columns.texts import TextColumn

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
    ("modality", "names", "only"),
    [
        ("text", ["text", "texts", "lists"], None),
        ("embedding", ["vector"], "vector"),
        ("audio", ["sound", "bytes"], "sound"),
    ],
)
def test_second_columns_are_found_and_others_refused(
    modality: str, names: list[str], only: str | None
) -> None:
    for name in names:
        assert find_second_column(FEATURES, modality, name) == name
    listed = only or ", ".join(names)
    for name in {*FEATURES, "absent"}.difference(names):
        message = f"of {modality}, got '{name}'; columns of {modality}: {listed}; all: text, texts"
        with pytest.raises(ValueError, match=message):
            find_second_column(FEATURES, modality, name)
    if only:
        assert find_second_column(FEATURES, modality, None) == only
        return
    with pytest.raises(ValueError, match=r"must be given .* got 3; columns of text: t"):
        find_second_column(FEATURES, modality, None)
