"""The labelled data set that a run is measured on, where it is not trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
from workflow import SMALL, train

from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.building.data import open_training_data
from vicreg_hf.training.building.monitor_data import open_monitor_data

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def unlabelled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    table = datasets.Dataset.from_parquet(str(images / "train.parquet"))
    table.remove_columns("kind").to_parquet(folder / "train.parquet")  # pyright: ignore
    return folder


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images in a single split."""
    folder = tmp_path_factory.mktemp("data") / "alone"
    folder.mkdir()
    shutil.copy(images / "test.parquet", folder / "validation.parquet")
    return folder


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_without_labels_is_measured_on_other_images(
    streaming: str, images: Path, unlabelled: Path, alone: Path, tmp_path: Path
) -> None:
    flags = ["--max_steps=1", "--image_size=32", f"--streaming={streaming}"]
    data, subject = images, "images (test), neighbours from images (train)"
    if streaming == "true":
        data, subject = alone, "alone (validation) by leave-one-out"
    rows = train(unlabelled, tmp_path, *flags, f"--monitor_dataset_name={data}")
    assert [row["knn_images"] for row in rows] == [subject] * 2
    assert rows[-1]["knn"] > 0.9
    assert subject.split(",")[0] in (tmp_path / "encoder" / "README.md").read_text()


@pytest.mark.parametrize(("flags", "message"), [
    ([], r"got .*: kNN needs labels, but .* name their column with --monitor_label_column"),
    (["--monitor_label_column=other"], "monitor_label_column must name a column, got 'other'"),
    (["--monitor_image_column=other"], "monitor_image_column must name a column of images, got"),
    (["--monitor_train_split=other"], "monitor_train_split must be one of train, test"),
    (["--monitor_eval_split=train"], "monitor_eval_split must hold other images than monitor_tra"),
])  # fmt: skip
def test_data_that_cannot_be_measured_on_are_refused(
    flags: list[str], message: str, images: Path, unlabelled: Path, tmp_path: Path
) -> None:
    monitored = unlabelled if not flags else images
    args, data = open_training_data(parse_arguments(
        [*SMALL, f"--dataset_name={unlabelled}", f"--output_dir={tmp_path}",
         f"--monitor_dataset_name={monitored}", *flags]
    ))  # fmt: skip
    with pytest.raises(ValueError, match=f"^monitor_dataset_name must name images .*{message}"):
        open_monitor_data(args, data)
