"""Parquet files of a folder that number their classes differently: each split has its own names."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List
from datasets import Image as ImageFeature
from families import trained
from pictures import PNG

from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.features.extract import extract_dataset
from vicreg_hf.settings.extraction import ExtractionArguments

pytestmark = pytest.mark.usefixtures("own_cache")

ANIMALS, REVERSED = ["ant", "bee"], ["bee", "ant"]


def write(folder: Path, **names: list[str]) -> Path:
    """A folder of parquet files, each of an ant and a bee, with class names of its own."""
    folder.mkdir()
    for split, own in names.items():
        numbers = [own.index(name) for name in ANIMALS]
        kind = ClassLabel(names=own)
        features = Features({"image": ImageFeature(), "label": kind, "labels": List(kind)})
        rows = {
            "image": [{"bytes": PNG, "path": None}] * 2,
            "label": numbers,
            "labels": [[number] for number in numbers],
        }
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_each_split_has_the_names_of_its_own_files_and_extraction_makes_them_one(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "d", train=ANIMALS, test=REVERSED)
    splits = open_dataset(str(folder))
    for split, names in {"train": ANIMALS, "test": REVERSED}.items():
        kinds = splits[split].features
        assert kinds["label"].names == kinds["labels"].feature.names == names
        assert kinds["label"].int2str(splits[split][1]["label"]) == "bee"
    trained().save_pretrained(tmp_path / "encoder", include_expander=False)
    extract_dataset(ExtractionArguments(
        str(tmp_path / "encoder"), str(folder), str(tmp_path / "out"), num_workers=0,
        label_column="label",
    ))  # fmt: skip
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    assert len(files) == 2
    for file in files:
        kind = Features.from_arrow_schema(pq.read_schema(file))["label"]
        assert isinstance(kind, ClassLabel)
        assert kind.names == ANIMALS
        assert Dataset(pq.read_table(file))["label"][:] == [0, 1]


def test_files_of_one_split_that_differ_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", **{
        "train-00000-of-00002": ANIMALS, "train-00001-of-00002": REVERSED, "test": ANIMALS,
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"same in all files .*00001-of-.* for 'label' than"):
        open_dataset(str(folder))
