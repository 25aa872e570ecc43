"""Subsets of labels: shares of every class, and lists in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from pictures import photographs, png, split_of

from vicreg_hf.data.splits import image_split
from vicreg_hf.evaluation.label_lists import listed_subset, paths_of_images
from vicreg_hf.metrics.subsets import balanced_subset

SIZES = (1000, 150, 40, 3)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))

# --- balanced


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.01, [10, 2, 1, 1]),  # 1.5 rounds to 2; 0.4 and 0.03 to none, but one is the least
        (0.1, [100, 15, 4, 1]),
        (1.0, list(SIZES)),
    ],
)
def test_every_class_gives_its_share_and_at_least_one_row(
    fraction: float, expected: list[int]
) -> None:
    rows = balanced_subset(LABELS, fraction, seed=0)
    assert np.bincount(LABELS[rows]).tolist() == expected
    assert (np.diff(rows) > 0).all()  # ascending, none twice
    assert rows.dtype == np.int64


def test_a_subset_is_a_function_of_labels_fraction_and_seed() -> None:
    first = balanced_subset(LABELS, 0.1, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        state = torch.get_rng_state()
        again = balanced_subset(torch.from_numpy(LABELS), 0.1, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(again, first)
    assert len(np.intersect1d(balanced_subset(LABELS, 0.1, seed=4), first)) < len(first) / 2


def test_the_rows_of_a_class_are_drawn_from_all_of_it() -> None:
    drawn = [balanced_subset(np.zeros(20, np.int64), 0.05, seed=seed)[0] for seed in range(400)]
    assert np.bincount(drawn, minlength=20).min() > 4  # of 20 expected


def test_a_smaller_subset_is_within_a_larger_one() -> None:
    small, large = balanced_subset(LABELS, 0.01, seed=1), balanced_subset(LABELS, 0.1, seed=1)
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 1], 0.0, "above 0 and be at most 1, got 0.0"),
        ([0, 1], 1.5, "got 1.5"),
        ([0, 1], float("nan"), "got nan"),
        ([], 0.1, r"one integer a row, got float64 of shape \(0,\)"),
        ([0.5], 0.1, r"got float64 of shape \(1,\)"),
        ([[0, 1]], 0.1, r"of shape \(1, 2\)"),
        ([0, -1], 0.1, "class from 0, got -1 in row 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    labels: list[float], fraction: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_subset(labels, fraction)


# --- listed

PATHS = ["n01440764/n01440764_18.JPEG", None, "a/b/1.png", "a/c/1.png", "x/n02_7_n02.JPEG"]


def listing(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n01440764_18.JPEG\n", [0]),
        ("n02_7_n02.JPEG\n/data/train/n01440764/n01440764_18.JPEG\n", [0, 4]),
        ("c/1.png\n", [3]),  # the folder tells it from a/b/1.png
        ("4\n\n# a comment\n  1  \r\n4\n", [1, 4]),
        ("2\nn01440764_18.JPEG", [0, 2]),
    ],
)
def test_lines_name_rows(text: str, expected: list[int], tmp_path: Path) -> None:
    rows = listed_subset(listing(tmp_path, text), PATHS, len(PATHS))
    assert rows.tolist() == expected
    assert rows.dtype == np.int64


def test_imagenet_on_the_hub_has_each_synset_twice(tmp_path: Path) -> None:
    paths = ["n01440764_1_n01440764.JPEG", "n01440764_10026_n01440764.JPEG"]
    path = listing(tmp_path, "n01440764_10026.JPEG\nn01440764_1_n01440764.JPEG\n")
    assert listed_subset(path, paths, 2).tolist() == [0, 1]
    assert listed_subset(listing(tmp_path, "n01440764_10026.JPEG"), paths, 2).tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n7.png\n", r"got '7\.png' in line 2 of .*list\.txt; the images are named like 'n0144"),
        ("1.png", r"one image, got '1\.png' in line 1 of .*which rows 2 and 3 have"),
        ("z/1.png", r"got 'z/1\.png' in line 1 of .*which rows 2 and 3 have"),
        ("0\n5\n", r"one of 0 to 4, got 5 in line 2"),
        ("-1", r"got '-1' in line 1"),
        ("# nothing\n\n", r"must name some, got none in .*list\.txt"),
    ],
)
def test_a_line_that_names_no_row_is_itself_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        listed_subset(listing(tmp_path, text), PATHS, len(PATHS))


def test_images_without_names_are_listed_by_number(tmp_path: Path) -> None:
    assert listed_subset(listing(tmp_path, "1"), [None, None], 2).tolist() == [1]
    with pytest.raises(ValueError, match=r"by row numbers, got '1\.png' in line 1"):
        listed_subset(listing(tmp_path, "1.png"), [None, None], 2)


def test_a_list_that_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a text file, got .*absent"):
        listed_subset(tmp_path / "absent", PATHS, len(PATHS))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"must be a text file, got .*bytes"):
        listed_subset(tmp_path / "bytes", PATHS, len(PATHS))


def test_paths_are_read_from_the_data_in_the_order_of_rows() -> None:
    cells = [{"bytes": png(x), "path": f"{k}.png"} for k, x in enumerate(photographs(3))]
    table = Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()}))
    shuffled = DatasetDict({"train": table.select([2, 0, 1])})
    split = image_split(shuffled, "train", dataset_name="photographs")
    assert paths_of_images(split) == ["2.png", "0.png", "1.png"]
    assert paths_of_images(split_of(photographs(2))) == [None, None]
