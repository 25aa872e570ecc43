"""Columns of precomputed embeddings."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from paired import WIDTH, write_vectors
from sklearn.linear_model import Ridge

from vicreg_hf.data.columns.base import BatchColumn
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.vectors import VectorColumn
from vicreg_hf.data.opening.dataset import open_dataset


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    folder = write_vectors(tmp_path_factory.mktemp("vectors"), rows=400, test_rows=8)
    return open_dataset(str(folder))["train"]


def test_vectors_come_from_a_file_as_they_are(table: datasets.Dataset) -> None:
    found = VectorColumn.find(table.features, "vector")
    assert found.width == WIDTH
    column: BatchColumn = pickle.loads(pickle.dumps(found))
    prepared = column.prepare(table)
    assert prepared.column_names == ["vector"]
    batch = column.batch([column.decode(cell) for cell in prepared[:5]["vector"]], range(5), 0, 0)
    expected = table.with_format("arrow")[:5]["vector"].combine_chunks().flatten().to_numpy()
    assert isinstance(batch, torch.Tensor)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy().ravel(), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", [datasets.List, datasets.LargeList])
def test_any_float_type_becomes_float32(dtype: str, kind: Any) -> None:
    features = datasets.Features({"v": kind(datasets.Value(dtype))})
    cells = np.array([[0.5, -2.0, 3.25]], dtype=dtype)
    table = datasets.Dataset.from_dict({"v": list(cells)}, features=features)
    column = VectorColumn.find(table.features, "v")
    decoded = column.decode(table[0]["v"])
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [0.5, -2.0, 3.25]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_undeclared_width_is_that_of_the_first_usable_vector(streaming: bool) -> None:
    features = datasets.Features({"v": datasets.List(datasets.Value("float32"))})
    cells = [None, [], [float("nan")], [1.0, 2.0], [1.0, 2.0, 3.0]]
    table = datasets.Dataset.from_dict({"v": cells}, features=features)
    column = VectorColumn.find(table.features, "v")
    assert column.width is None
    column = column.measured(table.to_iterable_dataset() if streaming else table)
    assert column.width == 2
    with pytest.raises(ImageError, match=r"of shape \(2,\), got \(3,\)"):
        column.decode(table[4]["v"])
    with pytest.raises(ValueError, match="must hold vectors, got none"):
        VectorColumn("v").measured(table.select(range(3)))
    mixed = datasets.Dataset.from_dict({"v": [[1.0] * k for k in (1, 2, 3, 4)]}, features=features)
    with pytest.raises(ValueError, match="of one width, got 1 to 4 numbers"):
        VectorColumn("v").measured(mixed)


@pytest.mark.parametrize(
    "cell",
    [
        None, [], [1.0, 2.0], [1.0, 2.0, float("nan")], [1.0, float("inf"), 2.0], [1.0, None, 2.0],
        [[1.0, 2.0, 3.0]], [1e39, 0.0, 0.0], ["a", "b", "c"], "abc", 3.0, {"a": 1.0}, [[1.0], 2, 3],
        [1 << 5000, 0, 0],
    ],
)  # fmt: skip
def test_what_is_no_finite_vector_of_that_width_is_bad(cell: Any) -> None:
    with pytest.raises(ImageError, match="vector"):
        VectorColumn("v", 3).decode(cell)


@pytest.mark.parametrize("name", ["picture", "shape", "nothing"])
def test_another_column_is_refused_with_the_candidates(table: datasets.Dataset, name: str) -> None:
    with pytest.raises(ValueError, match="columns of vectors: vector; all: picture, vector, shape"):
        VectorColumn.find(table.features, name)


def test_the_vectors_tell_of_their_images(tmp_path: Path) -> None:
    """A linear map from pixels predicts vectors of held-out images better than their mean does."""
    splits = open_dataset(str(write_vectors(tmp_path, rows=1500, test_rows=200)))
    column = ImageColumn("picture", splits["train"].features["picture"])
    pixels, vectors = {}, {}
    for name, table in splits.items():
        cells = column.prepare(table)["picture"]
        pixels[name] = np.stack([column.decode(cell).numpy().ravel() / 255 for cell in cells])
        vectors[name] = np.array(table["vector"])
    fitted = Ridge(alpha=100).fit(pixels["train"], vectors["train"])
    assert fitted.score(pixels["test"], vectors["test"]) > 0.1
    assert fitted.score(pixels["test"], vectors["test"][::-1]) < 0
