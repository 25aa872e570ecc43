"""Two splits with the same classes: what the numbers of one mean in the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
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


def listed(*names: str) -> Any:
    return List(ClassLabel(names=list(names)))


@pytest.mark.parametrize("how", ["parquet", "saved"])
def test_classes_are_numbered_as_the_training_split_names_them(how: str, tmp_path: Path) -> None:
    one, other = (ClassLabel(names=names) for names in (ANIMALS, REVERSED))
    data = opened(
        save(
            tmp_path / "d",
            how,
            train=table(one, [0, 1, None, 2]),
            test=table(other, [0, -1, 1, 2]),
        )
    )
    assert data.names == ("ant", "bee", "cow")
    assert data.train.classes is not None
    assert data.test.classes is not None
    assert data.train.classes.tolist() == [0, 1, -1, 2]
    assert data.test.classes.tolist() == [2, -1, 1, 0]  # cow, none, bee, ant
    assert (data.train_name, data.test_name) == ("train", "test")
    assert data.train.targets is None


def test_lists_of_classes_are_numbered_alike(tmp_path: Path) -> None:
    train = table(listed(*ANIMALS), [[0], [1, 2], [], [2]])
    test = table(listed(*REVERSED), [[0], [0, 1], [2]])
    data = opened(save(tmp_path / "d", "parquet", train=train, test=test))
    assert data.names == ("ant", "bee", "cow")
    assert data.train.targets is not None
    assert data.test.targets is not None
    assert data.train.targets.int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert data.test.targets.int().tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 0]]
    assert data.train.classes is data.test.classes is None


def test_plain_values_are_classes_when_their_column_is_named(tmp_path: Path) -> None:
    train = table(Value("string"), ["cow", "ant", "bee", "ant"], "kind")
    test = table(
        Value("string"), ["cow", "cow", "bee"], "kind"
    )  # without an ant, which is no fault
    folder = save(tmp_path / "strings", "parquet", train=train, test=test)
    data = opened(folder, label_column="kind")
    assert data.names == ("ant", "bee", "cow")
    assert data.test.classes is not None
    assert data.test.classes.tolist() == [2, 2, 1]
    assert opened(folder).train.classes is None
    train = table(List(Value("int64")), [[10, 2], [7], [2]])
    test = table(List(Value("int64")), [[7], [10, 10]])
    data = opened(save(tmp_path / "lists", "parquet", train=train, test=test), label_column="label")
    assert data.names == ("2", "7", "10")
    assert data.test.targets is not None
    assert data.test.targets.int().tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["ant", "bee", "dog"], r"only d \(test\) has dog and only d \(train\) has cow; choose"),
        (["ant", "bee", "cow", "dog"], r"only d \(test\) has dog; choose another"),
    ],
)
def test_names_that_differ_are_refused(
    names: list[str], sentence: str, several: bool, tmp_path: Path
) -> None:
    def split(own: list[str]) -> Dataset:
        return table(listed(*own), [[0], [1]]) if several else table(ClassLabel(names=own), [0, 1])

    folder = save(tmp_path / "d", "saved", train=split(ANIMALS), test=split(names))
    with pytest.raises(
        ValueError, match=f"class names must be the same in both .*, and {sentence}"
    ):
        opened(folder)


@pytest.mark.parametrize(
    ("kind", "train", "test"),
    [
        (ClassLabel(names=ANIMALS), [0, 1], [-1, -1]),
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
    for part in (data.train, data.test):
        assert part.classes is part.targets is None
        assert len(part.split) == 2
    with pytest.raises(ValueError, match=r"label_column must hold a .*, got (rows of|none in)"):
        opened(folder, label_column="label")


def test_a_test_split_without_the_column_has_no_labels(tmp_path: Path) -> None:
    train = table(ClassLabel(names=ANIMALS), [0, 1])
    for name, other in {
        "none": train.remove_columns("label"),
        "another": table(ClassLabel(names=ANIMALS), [0, 1], "guess"),
    }.items():
        data = opened(save(tmp_path / name, "saved", train=train, test=other))
        assert data.train.classes is data.test.classes is None
    lists = table(listed(*ANIMALS), [[0], [1]])
    folder = save(tmp_path / "mixed", "saved", train=lists, test=train)
    assert opened(folder).test.targets is None
    with pytest.raises(ValueError, match="label_column must hold a list of classes in every row"):
        opened(folder, label_column="label")
    for column, sentence in (("image", "hold classes, or lists .* type Image"), ("kind", "name a")):
        with pytest.raises(ValueError, match=f"label_column must {sentence}.*; columns: image, l"):
            opened(folder, label_column=column)


def test_the_split_to_measure_on_is_found_or_named(tmp_path: Path) -> None:
    part = table(ClassLabel(names=ANIMALS), [0, 1])
    folder = save(tmp_path / "d", "saved", train=part, validation=part.select([1]), extra=part)
    assert opened(folder).test_name == "validation"
    assert len(opened(folder).test.split) == 1
    assert opened(folder, eval_split="extra").test_name == "extra"
    assert opened(folder, train_split="extra", eval_split="train").train_name == "extra"
    with pytest.raises(
        ValueError, match=r"eval_split must be given .*; .* has train, validation, "
    ):
        opened(folder, train_split="validation")
    with pytest.raises(
        ValueError, match=r"eval_split must be one of train, validation, extra, part .* got 'dev'"
    ):
        opened(folder, eval_split="dev")


def test_parts_of_one_split_are_learnt_from_and_measured_on(tmp_path: Path) -> None:
    one, other = (ClassLabel(names=names) for names in (ANIMALS, REVERSED))
    folder = save(
        tmp_path / "d", "parquet", train=table(one, [0, 1, 2, 2]), test=table(other, [0, 0, 1, 2])
    )
    data = opened(folder, train_split="train[:3]", eval_split="train[3:]")
    assert (len(data.train.split), len(data.test.split)) == (3, 1)
    data = opened(folder, train_split="train", eval_split="test[75%:]")
    assert data.test.classes is not None
    assert data.test.classes.tolist() == [0]  # the ant, which is 2 in this file
    with pytest.raises(ValueError, match=r"eval_split must hold other images than train_split, "):
        opened(folder, train_split="train[:3]", eval_split="train[2:]")
    with pytest.raises(
        ValueError, match="train_split must join splits of the same columns and class names"
    ):
        opened(folder, train_split="train+test[:1]", eval_split="test[1:]")


def test_files_that_declare_no_names_have_those_of_their_card(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "d", "parquet", train=table(Value("int64"), [0, 1, 2]),
        test=table(Value("int64"), [2, 2, 1]),
    )  # fmt: skip
    kinds = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": {"class_label": {
        "names": {str(k): name for k, name in enumerate(ANIMALS)}}}}]  # fmt: skip
    header = {"dataset_info": {"features": kinds}}
    (folder / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n")
    data = opened(folder)
    assert data.names == tuple(ANIMALS)
    assert data.test.classes is not None
    assert torch.equal(data.test.classes, torch.tensor([2, 2, 1]))
    (image,) = data.train.split.read([0])
    assert image.shape == (3, 8, 8)
