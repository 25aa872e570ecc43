"""Splits of data sets: their columns and labels, and their images read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pictures import PNG, photographs, png, table_of

from vicreg_hf.data.columns.finding import find_image_column, find_label_column
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.data.splits import ImageSplit, held_out_split, image_split

# --- columns and splits

FEATURES = Features(
    {
        "photo": ImageFeature(), "mask": ImageFeature(), "kind": ClassLabel(names=["a", "b"]),
        "author": Value("string"),
    }
)  # fmt: skip


def without(*names: str, **others: Any) -> Features:
    return Features({k: kind for k, kind in FEATURES.items() if k not in names} | others)


def test_the_image_column_is_the_one_asked_for_or_the_only_one() -> None:
    assert find_image_column(without("mask"), None) == "photo"
    assert find_image_column(FEATURES, "mask") == "mask"


@pytest.mark.parametrize(
    ("features", "wanted", "message"),
    [
        (FEATURES, None, "got 2; columns of images: photo, mask; all: photo, mask, kind, author"),
        (
            without("photo", "mask", jpg=Value("binary")),
            None,
            "got 0; columns of images: none; all: kind, author, jpg. Bytes of files may be images: "
            "--image_column jpg.",
        ),
        (FEATURES, "img", "got 'img'; columns of images: photo, mask; all: photo, mask, kind"),
    ],
)
def test_an_unclear_image_column_is_answered_with_all_columns(
    features: Features, wanted: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_image_column(features, wanted)


@pytest.mark.parametrize(
    ("features", "wanted", "expected"),
    [
        (FEATURES, None, "kind"),
        (FEATURES, "author", "author"),
        (without(other=ClassLabel(names=["c"])), None, None),
        (without(label=Value("string")), None, "kind"),
        (without("kind", label=Value("string")), None, "label"),
        (without("kind", label=Value("float32")), None, "label"),
        (without("kind", label=List(Value("int64"))), None, None),
    ],
)
def test_the_label_column_is_the_one_asked_for_or_the_only_one(
    features: Features, wanted: str | None, expected: str | None
) -> None:
    assert find_label_column(features, wanted) == expected
    with pytest.raises(ValueError, match="got 'none'; columns: photo, mask, "):
        find_label_column(features, "none")


def opened(table: Dataset, **columns: Any) -> ImageSplit:
    return image_split({"train": table}, "train", dataset_name="flowers", **columns)


def test_a_missing_or_empty_split_is_named() -> None:
    table = table_of([PNG])
    splits = {"train": table, "empty": table.select([])}
    for name, message in {
        "validation": "split must be one of train, empty, got 'validation'",
        "empty": "must have rows, got none in split 'empty' of flowers",
    }.items():
        with pytest.raises(ValueError, match=message):
            image_split(splits, name, dataset_name="flowers")


# --- labels


def labelled(labels: list[Any], kind: Any, column: str = "label") -> Dataset:
    features = Features({"image": ImageFeature(), column: kind})
    rows = {"image": [{"bytes": PNG, "path": None}] * len(labels), column: labels}
    return Dataset.from_dict(rows, features=features)


INTEGER, FLOAT, TEXT = Value("int64"), Value("float64"), Value("string")
CLASSES = ClassLabel(names=["china", "tulip"])


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "names"),
    [
        (TEXT, ["tulip", "china", "tulip"], [1, 0, 1], ("china", "tulip")),
        (TEXT, ["tulip", None], [0, -1], ("tulip",)),
        (INTEGER, [7, 3, 40], [1, 0, 2], ("3", "7", "40")),
        (INTEGER, [-1, 1, -1], [0, 1, 0], ("-1", "1")),
        (INTEGER, [7, -1, 3], [1, -1, 0], ("3", "7")),
        (FLOAT, [0.5, float("nan"), None], [0, -1, -1], ("0.5",)),
        (CLASSES, ["tulip", None], [1, -1], ("china", "tulip")),  # none, or the Hub's -1
        (CLASSES, ["tulip", -1], [1, -1], ("china", "tulip")),
    ],
)
def test_labels_of_any_kind_become_classes_from_0(
    kind: Any, labels: list[Any], classes: list[int], names: tuple[str, ...]
) -> None:
    split = opened(labelled(labels, kind, "kind"), label_column="kind")
    assert split.labels is not None
    assert split.labels.tolist() == classes
    assert split.label_names == names


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        (TEXT, ["tulip", "china", "tulip", "china"], ("china", "tulip")),
        (TEXT, [f"{number}" for number in range(10, 70)] * 2, tuple(map(str, range(10, 70)))),
        (TEXT, [f"tulip {number}" for number in range(60)], ()),
        (TEXT, ["tulip", "", "china", "tulip"], ("china", "tulip")),
        (INTEGER, [-1, -1, -1, -1], ()),
        (FLOAT, [2.0, None, 10.0, 2.0], ("2", "10")),
        (FLOAT, [0.5, 1.0, 2.0, 1.0], ()),
    ],
)
def test_a_column_called_label_is_taken_for_classes_if_it_looks_like_them(
    kind: Any, labels: list[Any], names: tuple[str, ...]
) -> None:
    split = opened(labelled(labels, kind))
    assert split.label_names == names
    assert (split.labels is not None) == bool(names)


def test_a_split_has_classes_if_the_largest_has_them() -> None:
    words = [f"tulip {number}" for number in range(60)]
    few, one_each, many = (labelled(part, TEXT) for part in (words[:2], words, words * 3))
    for train, test, count in ((one_each, few, 0), (many, one_each, 60)):
        split = image_split({"train": train, "test": test}, "test", dataset_name="flowers")
        assert len(split.label_names) == count


@pytest.mark.parametrize(("kind", "nothing"), [(TEXT, None), (CLASSES, None), (CLASSES, -1)])
def test_a_column_without_any_class_has_no_labels(kind: Any, nothing: int | None) -> None:
    table = labelled([nothing], kind, "kind")
    split = opened(table)
    assert split.labels is None
    assert split.label_names == ()
    with pytest.raises(ValueError, match=r"in some row, got none in 'kind' of flowers \(train\)"):
        opened(table, label_column="kind")


@pytest.mark.parametrize(
    "kind", [Features({"a": Value("int64")}), List(Value("int64")), ImageFeature()]
)
def test_a_column_that_holds_no_classes_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"label_column must hold classes, .* got 'kind'"):
        opened(labelled([None], kind, "kind"), image_column="image", label_column="kind")


# --- held-out splits

ROSES = labelled([0, 1], ClassLabel(names=["rose", "tulip"]))


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["train", "validation", "test"], None, "test"),
        (["test"], None, None),  # trained on
        (["train", "test", "extra"], "extra", "extra"),
    ],
)
def test_the_held_out_split_is_never_the_training_split(
    names: list[str], wanted: str | None, expected: str | None
) -> None:
    splits = dict.fromkeys(names, ROSES)
    found, name = held_out_split(splits, wanted, names[0], dataset_name="flowers")
    assert name == expected
    assert (found is None) == (expected is None)


def test_what_is_trained_on_or_has_no_labels_is_not_held_out() -> None:
    splits = dict.fromkeys(["train", "validation", "test"], ROSES)
    parts = add_parts(splits, train_split="train+test", eval_split="test[1:]")
    assert held_out_split(parts, None, "train+test", dataset_name="flowers")[1] == "validation"
    with pytest.raises(ValueError, match=r"eval_split must hold other images than train_split, "):
        held_out_split(parts, "test[1:]", "train+test", dataset_name="flowers")
    hidden = splits | {"test": ROSES.map(lambda _: {"label": -1})}
    assert held_out_split(hidden, None, "train", dataset_name="flowers")[1] == "validation"


# --- reading


def test_images_stored_without_their_type_are_found() -> None:
    """As parquet files hold them that other programs have written."""
    cell = {"bytes": Value("binary"), "path": Value("string")}
    encoded = [png(image) for image in photographs(2)]
    rows = [{"bytes": content, "path": None} for content in encoded]
    features = Features({"picture": cell, "size": Value("int64")})
    table = Dataset.from_dict({"picture": rows, "size": [1, 2]}, features=features)
    plain = Dataset.from_dict({"picture": encoded}, features=Features({"picture": Value("binary")}))
    for each, wanted in ((table, None), (table, "picture"), (plain, "picture")):
        read = opened(each, image_column=wanted).read([0, 1])
        torch.testing.assert_close(torch.stack(read), photographs(2), rtol=0, atol=0)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_arrays_are_images_of_as_many_channels(last: bool) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 9), dtype=np.uint8)
    rows = bands.transpose(0, 2, 3, 1) if last else bands
    features = Features({"bands": Array3D(rows.shape[1:], "uint8")})
    table = Dataset.from_dict({"bands": list(rows)}, features=features)
    read = torch.stack(opened(table, channels=5).read(range(3)))
    torch.testing.assert_close(read, torch.from_numpy(bands), rtol=0, atol=0)
    with pytest.raises(ImageError, match=r"shape \(4, H, W\) or \(H, W, 4\), got \("):
        opened(table, channels=4).read([0])
