"""Two splits with the same classes: what the numbers of one mean in the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from pictures import photographs, png

from vicreg_hf.data.labelled import LabelledData, open_labelled

pytestmark = pytest.mark.usefixtures("own_cache")

CELLS = [{"bytes": png(image), "path": None} for image in photographs(4, 8, 8)]
ANIMALS, REVERSED = ["ant", "bee", "cow"], ["cow", "bee", "ant"]


def table(kind: Any, labels: list[Any], column: str = "label") -> Dataset:
    features = Features({"image": ImageFeature(), column: kind})
    rows = {"image": CELLS[: len(labels)], column: labels}
    return Dataset.from_dict(rows, features=features)


def save(folder: Path, how: str, **splits: Dataset) -> Path:
    """As parquet files, of which `datasets` takes the first one's names for all, or as it saves."""
    if how == "saved":
        saved: Any = DatasetDict
        saved(splits).save_to_disk(folder)
        return folder
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}.parquet"))
    return folder


def opened(folder: Path, **given: Any) -> LabelledData:
    return open_labelled(str(folder), **({"train_split": "train", "eval_split": None} | given))


def numbers(data: LabelledData) -> list[Any]:
    """The classes, or the rows of targets, of both splits."""
    found = [each.classes if each.targets is None else each.targets.int()
             for each in (data.train, data.test)]  # fmt: skip
    return [None if values is None else values.tolist() for values in found]


def named(*names: str) -> ClassLabel:
    return ClassLabel(names=list(names))


def listed(*names: str) -> Any:
    return List(named(*names))


@pytest.mark.parametrize("how", ["parquet", "saved"])
def test_classes_are_numbered_as_the_training_split_names_them(how: str, tmp_path: Path) -> None:
    train = table(named(*ANIMALS), [0, 1, None, 2])
    test = table(named(*REVERSED), [0, -1, 1, 2])
    data = opened(save(tmp_path / "d", how, train=train, test=test))
    assert data.names == ("ant", "bee", "cow")
    assert numbers(data) == [[0, 1, -1, 2], [2, -1, 1, 0]]  # cow, none, bee, ant
    assert (data.train_name, data.test_name) == ("train", "test")
    assert data.train.targets is None


def test_lists_of_classes_are_numbered_alike(tmp_path: Path) -> None:
    train = table(listed(*ANIMALS), [[0], [1, 2], [], [2]])
    test = table(listed(*REVERSED), [[0], [0, 1], [2]])
    data = opened(save(tmp_path / "d", "parquet", train=train, test=test))
    assert data.names == ("ant", "bee", "cow")
    assert numbers(data) == [
        [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]], [[0, 0, 1], [0, 1, 1], [1, 0, 0]]
    ]  # fmt: skip
    assert data.train.classes is data.test.classes is None


@pytest.mark.parametrize(
    ("kind", "train", "test", "names", "found"),
    [
        (Value("string"), ["cow", "ant", "bee", "ant"], ["cow", "cow", "bee"],  # without an ant
         ("ant", "bee", "cow"), [2, 2, 1]),
        (List(Value("int64")), [[10, 2], [7], [2]], [[7], [10, 10]],
         ("2", "7", "10"), [[0, 1, 0], [0, 0, 1]]),
    ],
)  # fmt: skip
def test_plain_values_are_classes_when_their_column_is_named(
    kind: Any, train: list[Any], test: list[Any], names: tuple[str, ...], found: list[Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    splits = {"train": table(kind, train, "kind"), "test": table(kind, test, "kind")}
    folder = save(tmp_path / "d", "parquet", **splits)
    data = opened(folder, label_column="kind")
    assert data.names == names
    assert numbers(data)[1] == found
    assert numbers(opened(folder)) == [None, None]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["ant", "bee", "dog"], r"only d \(test\) has dog and only d \(train\) has cow; choose"),
        (["ant", "bee", "cow", "dog"], r"only d \(test\) has dog; choose another"),
    ],
)
def test_names_that_differ_are_refused(names: list[str], sentence: str, tmp_path: Path) -> None:
    for kind, labels in ((named, [0, 1]), (listed, [[0], [1]])):
        train, test = (table(kind(*own), labels) for own in (ANIMALS, names))
        folder = save(tmp_path / kind.__name__ / "d", "saved", train=train, test=test)
        with pytest.raises(ValueError, match=f"must be the same in both .*, and {sentence}"):
            opened(folder)


@pytest.mark.parametrize(
    ("kind", "train", "test"),
    [
        (named(*ANIMALS), [0, 1], [-1, -1]),
        (Value("string"), ["cat", "dog"], [None, None]),
        (listed(*ANIMALS), [[0], [1]], [[0], None]),
        (listed(*ANIMALS), [[0], [1, None]], [[0], [1]]),
        (listed(*ANIMALS), [[0], [-1]], [[0], [1]]),
    ],
)
def test_labels_that_a_split_or_some_lists_lack_are_none_unless_asked_for(
    kind: Any, train: list[Any], test: list[Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "d", "parquet", train=table(kind, train), test=table(kind, test))
    data = opened(folder)
    assert data.names == ()
    assert numbers(data) == [None, None]
    assert len(data.train.split) == len(data.test.split) == 2
    with pytest.raises(ValueError, match=r"label_column must hold a .*, got (rows of|none in)"):
        opened(folder, label_column="label")


def test_a_test_split_without_the_column_has_no_labels(tmp_path: Path) -> None:
    train = table(named(*ANIMALS), [0, 1])
    for name, other in {
        "none": train.remove_columns("label"),
        "another": table(named(*ANIMALS), [0, 1], "guess"),
    }.items():
        data = opened(save(tmp_path / name, "saved", train=train, test=other))
        assert numbers(data) == [None, None]
    lists = table(listed(*ANIMALS), [[0], [1]])
    folder = save(tmp_path / "mixed", "saved", train=lists, test=train)
    assert opened(folder).test.targets is None
    for column, sentence in {
        "label": "hold a list of classes in every row",
        "image": "hold classes, or lists .* type Image.*; columns: image, l",
        "kind": "name a.*; columns: image, l",
    }.items():
        with pytest.raises(ValueError, match=f"label_column must {sentence}"):
            opened(folder, label_column=column)


def test_the_split_to_measure_on_is_found_or_named(tmp_path: Path) -> None:
    part = table(named(*ANIMALS), [0, 1])
    folder = save(tmp_path / "d", "saved", train=part, validation=part.select([1]), extra=part)
    assert opened(folder).test_name == "validation"
    assert len(opened(folder).test.split) == 1
    assert opened(folder, eval_split="extra").test_name == "extra"
    assert opened(folder, train_split="extra", eval_split="train").train_name == "extra"
    for given, sentence in (
        ({"train_split": "validation"}, "must be given .*; .* has train, validation, "),
        ({"eval_split": "dev"}, "must be one of train, validation, extra, part .* got 'dev'"),
    ):
        with pytest.raises(ValueError, match=f"eval_split {sentence}"):
            opened(folder, **given)


def test_parts_of_one_split_are_learnt_from_and_measured_on(tmp_path: Path) -> None:
    train, test = table(named(*ANIMALS), [0, 1, 2, 2]), table(named(*REVERSED), [0, 0, 1, 2])
    folder = save(tmp_path / "d", "parquet", train=train, test=test)
    data = opened(folder, train_split="train[:3]", eval_split="train[3:]")
    assert (len(data.train.split), len(data.test.split)) == (3, 1)
    data = opened(folder, train_split="train", eval_split="test[75%:]")
    assert numbers(data)[1] == [0]  # the ant, which is 2 in this file
    for one, other, sentence in (
        ("train[:3]", "train[2:]", "eval_split must hold other images than train_split, "),
        ("train+test[:1]", "test[1:]", "must join splits of the same columns and class names"),
    ):
        with pytest.raises(ValueError, match=sentence):
            opened(folder, train_split=one, eval_split=other)


def test_files_that_declare_no_names_have_those_of_their_card(tmp_path: Path) -> None:
    train, test = (table(Value("int64"), labels) for labels in ([0, 1, 2], [2, 2, 1]))
    folder = save(tmp_path / "d", "parquet", train=train, test=test)
    names = {"names": {str(k): name for k, name in enumerate(ANIMALS)}}
    kinds = [{"name": "image", "dtype": "image"},
             {"name": "label", "dtype": {"class_label": names}}]  # fmt: skip
    header = {"dataset_info": {"features": kinds}}
    (folder / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n")
    data = opened(folder)
    assert data.names == tuple(ANIMALS)
    assert numbers(data)[1] == [2, 2, 1]
    assert data.train.split.read([0])[0].shape == (3, 8, 8)
