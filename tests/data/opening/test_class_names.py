"""Parquet files of a folder that number their classes differently: each split has its own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from datasets import Image as ImageFeature
from families import trained
from pictures import png
from warm import run_pretraining, run_script
from workflow import SMALL, metrics

from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import add_parts

pytestmark = pytest.mark.usefixtures("own_cache")

ANIMALS, REVERSED = ["ant", "bee"], ["bee", "ant"]


def cell(number: int, light: bool) -> dict[str, Any]:
    """Noise, dark for ants and light for bees."""
    noise = torch.randint(128, (3, 32, 32), generator=torch.Generator().manual_seed(number))
    return {"bytes": png((noise + 127 * light).byte()), "path": None}


def write(folder: Path, **names: list[str]) -> Path:
    """A folder of parquet files, with the class names of each as given."""
    folder.mkdir()
    for seed, (split, own) in enumerate(names.items()):
        shown = [ANIMALS[k % 2] for k in range(32)]
        rows = {
            "image": [cell(100 * seed + k, name == "bee") for k, name in enumerate(shown)],
            "label": [own.index(name) for name in shown],
            "labels": [[own.index(name)] for name in shown],
        }
        kind = ClassLabel(names=own)
        features = Features({"image": ImageFeature(), "label": kind, "labels": List(kind)})
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_each_split_has_the_names_of_its_own_files(tmp_path: Path) -> None:
    splits = open_dataset(str(write(tmp_path / "d", train=ANIMALS, test=REVERSED)))
    for split, names in {"train": ANIMALS, "test": REVERSED}.items():
        kinds = splits[split].features
        assert kinds["label"].names == kinds["labels"].feature.names == names
        assert kinds["label"].int2str(splits[split][1]["label"]) == "bee"


def test_a_run_measures_by_the_names_of_classes(tmp_path: Path) -> None:
    found = []
    for name, test in {"alike": ANIMALS, "reversed": REVERSED}.items():
        folder, output = write(tmp_path / name, train=ANIMALS, test=test), tmp_path / f"{name}-run"
        done = run_pretraining(
            *SMALL, f"--dataset_name={folder}", "--max_steps=2", f"--output_dir={output}"
        )
        assert done.returncode == 0, done.stderr
        found.append([(row["knn"], row.get("knn_pixels")) for row in metrics(output)
                      if "knn" in row])  # fmt: skip
    assert found[0] == found[1]
    assert found[0][0][1] > 0.9  # noise is told by how light it is


def test_extracted_classes_are_of_the_same_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", train=ANIMALS, test=REVERSED)
    trained().save_pretrained(tmp_path / "encoder", include_expander=False)
    done = run_script(
        "scripts/extract_features.py", f"--model={tmp_path / 'encoder'}",
        f"--dataset_name={folder}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0",
        "--label_column=label",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "out").rglob("*.parquet"))
    assert len(files) == 2
    for file in files:
        table = Dataset(pq.read_table(file))
        kind = Features.from_arrow_schema(pq.read_schema(file))["label"]
        assert isinstance(kind, ClassLabel)
        assert kind.names == ANIMALS
        assert table["label"][:4] == [0, 1, 0, 1], file


def test_files_of_one_split_that_differ_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", **{
        "train-00000-of-00002": ANIMALS, "train-00001-of-00002": REVERSED, "test": ANIMALS,
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"same in all files .*00001-of-.* for 'label' than"):
        open_dataset(str(folder))


def test_splits_that_differ_are_not_joined(tmp_path: Path) -> None:
    splits = open_dataset(str(write(tmp_path / "d", train=ANIMALS, test=REVERSED)))
    with pytest.raises(ValueError, match=r"got 'train\+test', where test declares others for 'la"):
        add_parts(splits, train_split="train+test")
