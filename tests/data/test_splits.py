"""Splits of data sets: their columns and labels, and their images read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from pictures import photographs, png, table_of

from vicreg_hf.data.columns.finding import find_image_column, find_label_column
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.data.splits import held_out_split, image_split

# --- columns and splits

FEATURES = Features(
    {
        "photo": ImageFeature(),
        "mask": ImageFeature(),
        "kind": ClassLabel(names=["a", "b"]),
        "author": Value("string"),
    }
)


def without(*names: str) -> Features:
    return Features({name: kind for name, kind in FEATURES.items() if name not in names})


def test_the_image_column_is_the_one_asked_for_or_the_only_one() -> None:
    assert find_image_column(without("mask"), None) == "photo"
    assert find_image_column(FEATURES, "mask") == "mask"


@pytest.mark.parametrize(
    ("features", "wanted", "message"),
    [
        (FEATURES, None, "got 2; columns of images: photo, mask; all: photo, mask, kind, author"),
        (
            Features({**without("photo", "mask"), "jpg": Value("binary")}),
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
        (Features({**FEATURES, "other": ClassLabel(names=["c"])}), None, None),
        (Features({**FEATURES, "label": Value("string")}), None, "kind"),
        (Features({**without("kind"), "label": Value("string")}), None, "label"),
        (Features({**without("kind"), "label": Value("float32")}), None, "label"),
        (Features({**without("kind"), "label": List(Value("int64"))}), None, None),
    ],
)
def test_the_label_column_is_the_one_asked_for_or_the_only_one(
    features: Features, wanted: str | None, expected: str | None
) -> None:
    assert find_label_column(features, wanted) == expected
    with pytest.raises(ValueError, match="got 'none'; columns: photo, mask, "):
        find_label_column(features, "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("validation", "split must be one of train, empty, got 'validation'"),
        ("empty", "must have rows, got none in split 'empty' of flowers"),
    ],
)
def test_a_missing_or_empty_split_is_named(name: str, message: str) -> None:
    table = table_of([png(photographs(1)[0])])
    splits = DatasetDict({"train": table, "empty": table.select([])})
    with pytest.raises(ValueError, match=message):
        image_split(splits, name, dataset_name="flowers")


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        (["tulip", "china", "tulip"], [1, 0, 1], ("china", "tulip")),
        ([7, 3, 40], [1, 0, 2], ("3", "7", "40")),
        ([-1, 1, -1], [0, 1, 0], ("-1", "1")),
        ([7, -1, 3], [1, -1, 0], ("3", "7")),
    ],
)
def test_labels_of_any_kind_become_classes_from_0(
    labels: list[Any], classes: list[int], names: tuple[str, ...]
) -> None:
    table = table_of([png(image) for image in photographs(3)], kind=labels)
    split = image_split(
        DatasetDict({"train": table}), "train", dataset_name="flowers", label_column="kind"
    )
    assert split.labels is not None
    torch.testing.assert_close(split.labels, torch.tensor(classes))
    assert split.label_names == names


def kind_of(labels: list[Any]) -> str:
    return {str: "string", int: "int64", float: "float64"}[type(labels[0])]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["tulip", "china", "tulip", "china"], ("china", "tulip")),
        ([f"{number}" for number in range(10, 70)] * 2, tuple(map(str, range(10, 70)))),
        ([f"tulip {number}" for number in range(60)], ()),
        ([-1, -1, -1, -1], ()),
        ([2.0, None, 10.0, 2.0], ("2", "10")),
        ([0.5, 1.0, 2.0, 1.0], ()),
        (["tulip", "", "china", "tulip"], ("china", "tulip")),
    ],
)
def test_a_column_called_label_is_taken_for_classes_if_it_looks_like_them(
    labels: list[Any], names: tuple[str, ...]
) -> None:
    features = Features({"image": ImageFeature(), "label": Value(kind_of(labels))})
    cells = [{"bytes": png(photographs(1)[0]), "path": None}] * len(labels)
    table = Dataset.from_dict({"image": cells, "label": labels}, features=features)
    split = image_split({"train": table}, "train", dataset_name="flowers")
    assert split.label_names == names
    assert (split.labels is not None) == bool(names)


def test_a_split_has_classes_if_the_largest_has_them() -> None:
    cell = png(photographs(1)[0])
    words = [f"tulip {number}" for number in range(60)]
    captioned = {
        "train": table_of([cell] * 60, label=words),
        "test": table_of([cell] * 2, label=words[:2]),
    }
    assert image_split(captioned, "test", dataset_name="flowers").labels is None
    many = {"train": table_of([cell] * 180, label=words * 3), "test": captioned["train"]}
    assert len(image_split(many, "test", dataset_name="flowers").label_names) == 60


CLASSES = ClassLabel(names=["china", "tulip"])


@pytest.fixture(
    params=[(Value("string"), None), (CLASSES, None), (CLASSES, -1)],
    ids=["string-null", "class-null", "class-minus-one"],
)
def partly_labelled(request: pytest.FixtureRequest) -> DatasetDict:
    """Two rows, one of them without a class: null, or the Hub's -1."""
    kind, nothing = request.param
    rows = {"image": [{"bytes": b"", "path": None}] * 2, "kind": ["tulip", nothing]}
    features = Features({"image": ImageFeature(), "kind": kind})
    return DatasetDict({"train": Dataset.from_dict(rows, features=features)})


def test_images_without_a_class_are_told_from_others(partly_labelled: DatasetDict) -> None:
    declared = isinstance(partly_labelled["train"].features["kind"], ClassLabel)
    split = image_split(partly_labelled, "train", dataset_name="flowers", label_column="kind")
    assert split.labels is not None
    assert split.labels.tolist() == ([1, -1] if declared else [0, -1])
    assert split.label_names == (("china", "tulip") if declared else ("tulip",))


def test_a_column_without_any_class_has_no_labels(partly_labelled: DatasetDict) -> None:
    rows = DatasetDict({"train": partly_labelled["train"].select([1])})
    split = image_split(rows, "train", dataset_name="flowers")
    assert split.labels is None
    assert split.label_names == ()
    with pytest.raises(ValueError, match=r"in some row, got none in 'kind' of flowers \(train\)"):
        image_split(rows, "train", dataset_name="flowers", label_column="kind")


def test_numbers_that_are_none_are_no_classes() -> None:
    features = Features({"image": ImageFeature(), "kind": Value("float64")})
    rows = {"image": [None] * 3, "kind": [0.5, float("nan"), None]}
    table = Dataset.from_dict(rows, features=features)
    split = image_split({"train": table}, "train", dataset_name="flowers", label_column="kind")
    assert split.labels is not None
    assert split.labels.tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    "kind", [Features({"a": Value("int64")}), List(Value("int64")), ImageFeature()]
)
def test_a_column_that_holds_no_classes_is_refused(kind: Any) -> None:
    features = Features({"image": ImageFeature(), "kind": kind})
    table = Dataset.from_dict({"image": [None], "kind": [None]}, features=features)
    with pytest.raises(ValueError, match=r"label_column must hold classes, .* got 'kind'"):
        image_split(
            {"train": table}, "train", dataset_name="flowers", image_column="image",
            label_column="kind",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["train", "validation", "test"], None, "test"),
        (["train"], None, None),
        (["test"], None, None),  # trained on
        (["train", "test", "extra"], "extra", "extra"),
    ],
)
def test_the_held_out_split_is_never_the_training_split(
    names: list[str], wanted: str | None, expected: str | None
) -> None:
    splits = DatasetDict(dict.fromkeys(names, labelled()))
    found, name = held_out_split(splits, wanted, names[0], dataset_name="flowers")
    assert name == expected
    assert (found is None) == (expected is None)


def test_what_is_trained_on_is_not_held_out() -> None:
    splits = DatasetDict(dict.fromkeys(["train", "validation", "test"], labelled()))
    splits = add_parts(splits, train_split="train+test", eval_split="test[1:]")
    assert held_out_split(splits, None, "train+test", dataset_name="flowers")[1] == "validation"
    with pytest.raises(ValueError, match=r"eval_split must hold other images than train_split, "):
        held_out_split(splits, "test[1:]", "train+test", dataset_name="flowers")


def test_an_unlabelled_test_split_does_not_hide_the_validation_split() -> None:
    table = labelled()
    hidden = table.map(lambda _: {"label": -1})
    splits = DatasetDict({"train": table, "test": hidden, "validation": table})
    assert held_out_split(splits, None, "train", dataset_name="flowers")[1] == "validation"


def labelled() -> Dataset:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["rose", "tulip"])})
    cells = [{"bytes": b"", "path": None}] * 2
    return Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)


# --- reading


@pytest.mark.parametrize("cell", [None, b"", b"<html>404</html>"])
def test_a_bad_image_names_its_row(cell: bytes | None) -> None:
    good = png(photographs(1)[0])
    splits = DatasetDict({"train": table_of([good, good, cell, good])})
    split = image_split(splits, "train", dataset_name="flowers")
    assert len(split.read([0, 1, 3])) == 3
    with pytest.raises(ImageError, match=r"row 2 of flowers \(train\), column image: the image"):
        split.read([3, 2])


def test_images_stored_without_their_type_are_found() -> None:
    """As parquet files hold them that other programs have written."""
    cell = {"bytes": Value("binary"), "path": Value("string")}
    encoded = [png(image) for image in photographs(2)]
    rows = [{"bytes": content, "path": None} for content in encoded]
    features = Features({"picture": cell, "size": Value("int64")})
    table = Dataset.from_dict({"picture": rows, "size": [1, 2]}, features=features)
    plain = Dataset.from_dict({"picture": encoded}, features=Features({"picture": Value("binary")}))
    for each, wanted in ((table, None), (table, "picture"), (plain, "picture")):
        split = image_split({"train": each}, "train", dataset_name="x", image_column=wanted)
        torch.testing.assert_close(torch.stack(split.read([0, 1])), photographs(2), rtol=0, atol=0)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_arrays_are_images_of_as_many_channels(last: bool) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (3, 5, 8, 9), dtype=np.uint8)
    rows = bands.transpose(0, 2, 3, 1) if last else bands
    features = Features({"bands": Array3D(rows.shape[1:], "uint8")})
    table = Dataset.from_dict({"bands": list(rows)}, features=features)
    split = image_split(
        DatasetDict({"train": table}), "train", dataset_name="satellite", channels=5
    )
    read = torch.stack(split.read(range(3)))
    torch.testing.assert_close(read, torch.from_numpy(bands), rtol=0, atol=0)
    other = image_split({"train": table}, "train", dataset_name="satellite", channels=4)
    with pytest.raises(ImageError, match=r"shape \(4, H, W\) or \(H, W, 4\), got \("):
        other.read([0])
