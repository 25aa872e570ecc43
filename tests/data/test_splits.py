"""Splits of data sets: their columns and labels, and their images read."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from pictures import PNG, photographs, png, table_of

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.finding import find_image_column, find_label_column
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.data.samples import Sample
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
    binary = without("photo", "mask", jpg=Value("binary"))
    for features, wanted, message in (
        (FEATURES, None, "got 2; columns of images: photo, mask; all: photo, mask, kind, author"),
        (FEATURES, "img", "got 'img'; columns of images: photo, mask; all: photo, mask, kind"),
        (binary, None, "got 0; columns of images: none; .* may be images: --image_column jpg."),
    ):
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


@pytest.mark.parametrize("kind", [Features({"a": INTEGER}), List(INTEGER), ImageFeature()])
def test_a_column_that_holds_no_classes_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"label_column must hold classes, .* got 'kind'"):
        opened(labelled([None], kind, "kind"), image_column="image", label_column="kind")


# --- held-out splits

ROSES = labelled([0, 1], ClassLabel(names=["rose", "tulip"]))


def test_the_held_out_split_has_labels_and_is_not_trained_on() -> None:
    def found(splits: Any, wanted: str | None, train: str) -> str | None:
        split, name = held_out_split(splits, wanted, train, dataset_name="flowers")
        assert (split is None) == (name is None)
        return name

    splits = dict.fromkeys(["train", "validation", "test"], ROSES)
    assert found(splits, None, "train") == "test"
    assert found(splits, "validation", "train") == "validation"
    assert found({"test": ROSES}, None, "test") is None
    hidden = splits | {"test": ROSES.map(lambda _: {"label": -1})}
    assert found(hidden, None, "train") == "validation"
    parts = add_parts(splits, train_split="train+test", eval_split="test[1:]")
    assert found(parts, None, "train+test") == "validation"
    with pytest.raises(ValueError, match=r"eval_split must hold other images than train_split, "):
        found(parts, "test[1:]", "train+test")


# --- reading


@pytest.mark.parametrize(("kind", "found"), [
    ({"bytes": "binary", "path": "string"}, True),
    ({"bytes": "large_binary", "path": "large_string"}, True),  # as polars writes them
    ({"bytes": "binary_view", "path": "string_view"}, True),
    ({"bytes": "binary", "path": "null"}, True),  # as pandas does
    ({"bytes": "binary"}, True),
    ({"path": "string"}, False),
    ("large_binary", False),
    ("large_string", False),
])  # fmt: skip
def test_whatever_datasets_casts_to_images_is_taken(kind: Any, found: bool, tmp_path: Path) -> None:
    kinds = kind if isinstance(kind, dict) else {"bytes" if "binary" in kind else "path": kind}
    cells: list[Any] = [{"bytes": png(image), "path": None} for image in photographs(2)]
    if "bytes" not in kinds:
        for number, cell in enumerate(cells):
            cell["path"] = str(tmp_path / f"{number}.png")
        (tmp_path / "0.png").write_bytes(cells[0]["bytes"])
    cells = [{n: cell[n] for n in kinds} if kinds is kind else cell[min(kinds)] for cell in cells]
    typed = {n: Value(k) for n, k in kinds.items()}
    features = Features({"picture": typed if kinds is kind else typed[min(kinds)]})
    split = opened(
        Dataset.from_dict({"picture": cells}, features=features),
        image_column=None if found else "picture",
    )
    assert torch.equal(split.read([0])[0], photographs(1)[0])
    if "bytes" not in kinds:
        with pytest.raises(ImageError, match=r"cannot be read: .*No such file .*1.png"):
            split.read([1])


@pytest.mark.parametrize(("cell", "message"), [
    ([{"bytes": PNG}], r'row\["picture"\]\[0\]}\), then `dataset.cast_column\("picture"'),
    ([[[1, 2], [3, 4]]], r'cast_column\("picture", datasets.Array3D\(\(H, W, C\)'),
    (1, r'are taken as `dataset.cast_column\("picture", datasets.Image\(\)\)` makes them'),
    (base64.b64encode(PNG).decode(), "looks like base64; decode it first, with dataset.map"),
])  # fmt: skip
def test_what_is_no_image_is_told_how_to_become_one(cell: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(Dataset.from_dict({"picture": [cell]}), image_column="picture").read([0])


def test_arrays_of_two_dimensions_are_gray_images() -> None:
    gray = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    features = Features({"gray": Array2D((3, 4), "uint8")})
    table = Dataset.from_dict({"gray": list(gray)}, features=features)
    read = torch.stack(opened(table, channels=1).read([0, 1]))
    assert torch.equal(read, torch.from_numpy(gray)[:, None])
    with pytest.raises(
        ValueError, match=r"one channel, got 'gray' for 3 channels; give --model_arg"
    ):
        opened(table)


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


# --- images that cannot be used


@pytest.fixture(scope="module")
def damaged() -> ImageSplit:
    """Twenty photographs; rows 3, 13 and 14 cannot be used."""
    cells: list[bytes | None] = [png(image) for image in photographs(20)]
    cells[3], cells[13], cells[14] = b"<html>404</html>", b"", None
    return opened(table_of(cells))


def test_what_replaces_a_bad_image_depends_on_its_row_alone(damaged: ImageSplit) -> None:
    images = photographs(20)
    alone = [damaged.read_or_replace([row])[0][0] for row in range(20)]
    together, bad = damaged.read_or_replace(range(20))
    assert all(map(torch.equal, together, alone))
    assert {image.row for image in bad} == {3, 13, 14}
    sources = [[k for k in range(20) if torch.equal(images[k], image)] for image in together]
    assert all((sources[row] == [row]) == (row not in (3, 13, 14)) for row in range(20))
    assert [sources[row] for row in (3, 13, 14)] == [[5], [19], [8]]  # or runs would change


def test_a_bad_image_is_refused_by_its_row_or_left_out(damaged: ImageSplit) -> None:
    with pytest.raises(ImageError, match=r"^row 13 of flowers \(train\), column image: .*0 bytes"):
        damaged.read([0, 13, 3])
    found = damaged.try_read([0, 3, 4])
    assert [type(each) for each in found] == [Sample, BadImage, Sample]
    assert isinstance(found[2], Sample)
    assert found[2].key == 4
    assert torch.equal(found[2].content, damaged.read([4])[0])


def test_where_nothing_can_be_used_the_first_row_is_named() -> None:
    with pytest.raises(ImageError, match=r"row 1 of flowers \(train\), column image: the image is"):
        opened(table_of([b"", b"", b""])).read_or_replace([1])
