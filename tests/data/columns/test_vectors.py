"""Columns of precomputed embeddings."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
import torch

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.vectors import VectorColumn


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("length", [-1, 3])
def test_any_float_type_becomes_float32_as_it_is(dtype: str, length: int) -> None:
    features = datasets.Features({"v": datasets.List(datasets.Value(dtype), length=length)})
    cells = np.array([[0.5, -2.0, 3.25], [1.0, 0.0, -8.0]], dtype=dtype)
    table = datasets.Dataset.from_dict({"v": list(cells)}, features=features)
    found = VectorColumn.measure(table, "v")
    assert found == VectorColumn("v", 3)
    column = pickle.loads(pickle.dumps(found))
    batch = column.batch([column.decode(cell) for cell in column.prepare(table)["v"]], [0, 1], 0, 0)
    assert batch.dtype == torch.float32
    assert batch.tolist() == cells.tolist()


def test_an_undeclared_width_is_that_of_the_first_usable_vectors() -> None:
    features = datasets.Features({"v": datasets.List(datasets.Value("float32"))})
    cells = [None, [], [float("nan")], [1.0, 2.0], [1.0, 2.0, 3.0]]
    table = datasets.Dataset.from_dict({"v": cells}, features=features)
    assert VectorColumn.measure(table, "v").width == 2
    with pytest.raises(ValueError, match="must hold vectors, got none"):
        VectorColumn.measure(table.select(range(3)), "v")
    mixed = datasets.Dataset.from_dict({"v": [[1.0] * k for k in (1, 2, 3, 4)]}, features=features)
    with pytest.raises(ValueError, match="of one width, got 1 to 4 numbers"):
        VectorColumn.measure(mixed, "v")


def test_what_is_no_finite_vector_of_that_width_is_bad() -> None:
    for cell in (
        None, [], [1.0, 2.0], [1.0, float("inf"), 2.0], [1.0, None, 2.0], [[1.0, 2.0, 3.0]],
        [1e39, 0.0, 0.0],
    ):  # fmt: skip
        with pytest.raises(ImageError, match="vector"):
            VectorColumn("v", 3).decode(cell)
