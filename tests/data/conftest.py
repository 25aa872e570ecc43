"""Data sets that tests of reading share."""

from __future__ import annotations

import pytest
from datasets import DatasetDict
from pictures import photographs, png, table_of

from vicreg_hf.data.splits import ImageSplit, image_split


@pytest.fixture(scope="session")
def damaged() -> ImageSplit:
    """Twenty photographs; rows 3, 13 and 14 cannot be used."""
    cells: list[bytes | None] = [png(image) for image in photographs(20)]
    cells[3], cells[13], cells[14] = b"<html>404</html>", b"", None
    return image_split(DatasetDict({"train": table_of(cells)}), "train", dataset_name="flowers")
