"""Files that list the images whose labels may be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from pictures import photographs, png, split_of

from vicreg_hf.data.splits import image_split
from vicreg_hf.evaluation.label_lists import listed_subset, paths_of_images

PATHS = [
    "n01440764/n01440764_18.JPEG", None, "a/b/1.png", "a/c/1.png", "x/n02_7_n02.JPEG",
    "n01440764_10026_n01440764.JPEG",  # as ImageNet on the Hub has them
]  # fmt: skip


def listing(folder: Path, content: bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n02_7_n02.JPEG\n/data/train/n01440764/n01440764_18.JPEG\n", [0, 4]),
        ("c/1.png\n", [3]),  # the folder tells it from a/b/1.png
        ("4\n\n# a comment\n  1  \r\n4\nn01440764_18.JPEG", [0, 1, 4]),
        ("n01440764_10026.JPEG\n", [5]),
        ("\ufeffN01440764\\n01440764_18.jpeg\nA\\C\\1.PNG", [0, 3]),  # as Windows writes
        ("n01440764_10026_n01440764.JPEG\n", [5]),
    ],
)
def test_lines_name_rows(text: str, expected: list[int], tmp_path: Path) -> None:
    rows = listed_subset(listing(tmp_path, text.encode()), PATHS, len(PATHS))
    assert rows.tolist() == expected
    assert rows.dtype == np.int64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\n7.png\n", r"got '7\.png' in line 2 of .*list\.txt; the images are named like 'n0144"),
        (b"1.png", r"one image, got '1\.png' in line 1 of .*which rows 2 and 3 have"),
        (b"0\n6\n", r"one of 0 to 5, got 6 in line 2"),
        (b"# nothing\n\n", r"must name some, got none in .*list\.txt"),
        (b"\xff\xfe\x00", r"must be a text file, got .*list\.txt"),
    ],
)
def test_a_line_that_names_no_row_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        listed_subset(listing(tmp_path, text), PATHS, len(PATHS))


def test_images_without_names_are_listed_by_number(tmp_path: Path) -> None:
    assert listed_subset(listing(tmp_path, b"1"), [None, None], 2).tolist() == [1]
    with pytest.raises(ValueError, match=r"by row numbers, got '1\.png' in line 1"):
        listed_subset(listing(tmp_path, b"1.png"), [None, None], 2)


def test_paths_are_read_from_the_data_in_the_order_of_rows() -> None:
    cells = [{"bytes": png(x), "path": f"{k}.png"} for k, x in enumerate(photographs(3))]
    table = Dataset.from_dict({"image": cells}, features=Features({"image": ImageFeature()}))
    shuffled = DatasetDict({"train": table.select([2, 0, 1])})
    split = image_split(shuffled, "train", dataset_name="photographs")
    assert paths_of_images(split) == ["2.png", "0.png", "1.png"]
    assert paths_of_images(split_of(photographs(2))) == [None, None]
