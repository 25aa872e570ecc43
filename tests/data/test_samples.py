"""Rows read, and those that cannot be used refused, left out or replaced."""

from __future__ import annotations

import pytest
import torch
from datasets import DatasetDict
from pictures import photographs, table_of

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.samples import Sample
from vicreg_hf.data.splits import ImageSplit, image_split

BAD = (3, 13, 14)


def test_what_replaces_a_bad_image_depends_on_its_row_alone(damaged: ImageSplit) -> None:
    images = photographs(20)
    alone = [damaged.read_or_replace([row])[0][0] for row in range(20)]
    together, bad = damaged.read_or_replace(range(20))
    assert all(map(torch.equal, together, alone))
    assert {image.row for image in bad} == set(BAD)
    sources = [[k for k in range(20) if torch.equal(images[k], image)] for image in together]
    assert all((sources[row] == [row]) == (row not in BAD) for row in range(20))
    assert [sources[row] for row in BAD] == [[5], [19], [8]]  # or runs would change


def test_a_bad_image_is_refused_by_its_row_or_left_out(damaged: ImageSplit) -> None:
    with pytest.raises(ImageError, match=r"^row 13 of flowers \(train\), column image: .*0 bytes"):
        damaged.read([0, 13, 3])
    found = damaged.try_read([0, 3, 4])
    assert [type(each) for each in found] == [Sample, BadImage, Sample]
    assert isinstance(found[2], Sample)
    assert found[2].key == 4
    assert torch.equal(found[2].content, damaged.read([4])[0])


def test_where_nothing_can_be_used_the_first_row_is_named() -> None:
    splits = DatasetDict({"train": table_of([b"", b"", b""])})
    split = image_split(splits, "train", dataset_name="flowers")
    with pytest.raises(ImageError, match=r"row 1 of flowers \(train\), column image: the image is"):
        split.read_or_replace([1])
