"""Parts of features are read as they were written, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vicreg_hf.features.parts import Part, PartError, parts_of, read_part, write_part

ROWS = [10, 11, 13]


def table(rows: list[int]) -> pa.Table:
    values = pa.array(np.arange(4 * len(rows), dtype=np.float32) / 7)
    embedding = pa.FixedSizeListArray.from_arrays(values, 4)
    return pa.Table.from_arrays([pa.array(rows, pa.int64()), embedding], names=["row", "embedding"])


@pytest.fixture
def part(tmp_path: Path) -> Part:
    part = Part("train", range(10, 14), tmp_path / "data" / "train.parquet")
    write_part(part.file, table(ROWS))
    return part


def same(part: Part) -> bool:
    """Whether the rows and features are read that were written."""
    contents = read_part(part, 4)
    expected = np.arange(12, dtype=np.float32).reshape(3, 4) / np.float32(7)
    return contents.rows.tolist() == ROWS and np.array_equal(contents.features, expected)


def test_a_part_is_read_as_it_was_written(part: Part) -> None:
    assert same(part)
    assert read_part(part, 4, with_features=False).features.shape == (0, 4)
    assert [path.name for path in part.file.parent.iterdir()] == ["train.parquet"]
    assert pq.read_table(part.file).num_rows == 3
    with pytest.raises(FileNotFoundError):  # and is not damaged
        read_part(Part("train", range(4), part.file.with_name("absent")), 4)
    assert parts_of({}, part.file.parent, 10) == []


def test_whatever_byte_is_damaged_other_features_are_never_read(part: Part) -> None:
    whole = part.file.read_bytes()
    found = 0
    for place in range(0, len(whole), 3):
        torn = bytearray(whole)
        torn[place] ^= 0x55
        part.file.write_bytes(torn)
        try:
            assert same(part)
        except PartError:
            found += 1
    assert found > len(whole) // 12  # the rest are names, statistics and the like


def test_a_slice_of_a_table_is_read_as_it_was_written(part: Part) -> None:
    ids = pa.array([str(row) for row in range(40)])
    longer = table([*range(40)]).append_column("image_id", ids)
    write_part(part.file, longer.slice(10, 4))
    assert read_part(part, 4).rows.tolist() == [10, 11, 12, 13]


def test_a_part_of_an_earlier_version_is_read_and_its_pages_are_verified(part: Part) -> None:
    features = read_part(part, 4).features
    pq.write_table(table(ROWS), part.file, write_page_checksum=True, compression="none")
    assert same(part)
    torn = bytearray(part.file.read_bytes())
    torn[torn.index(features[1].tobytes())] ^= 1
    part.file.write_bytes(torn)
    with pytest.raises(PartError, match=r"(?i)crc|checksum"):
        read_part(part, 4)


@pytest.mark.parametrize("rows", [[9, 10], [13, 14], [11, 10], [11, 11]])
def test_rows_of_another_part_are_damage(rows: list[int], part: Part) -> None:
    write_part(part.file, table(rows))
    with pytest.raises(PartError, match="its rows are not of 10 to 13"):
        read_part(part, 4)


def test_features_of_another_width_and_cut_files_are_damage(part: Part) -> None:
    with pytest.raises(PartError, match="cannot reshape"):
        read_part(part, 5)
    whole = part.file.read_bytes()
    for left in (0, 4, -1):
        part.file.write_bytes(whole[:left])
        with pytest.raises(PartError, match=r"Parquet file size is 0|too small|magic|footer"):
            read_part(part, 4)
