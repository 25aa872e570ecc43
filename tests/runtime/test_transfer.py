"""Arrays arrive as they were, in few copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vicreg_hf.runtime import transfer

CPU = torch.device("cpu")
ARRAYS: list[NDArray[Any]] = [
    np.arange(5),
    np.linspace(0, 1, 7, dtype=np.float32),
    np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:],  # rows that are not contiguous
    np.array([[[3.0]], [[4.0]]], np.float32),
]


@pytest.mark.parametrize("send", [transfer.send_together, transfer._send_packed])
def test_arrays_arrive_as_they_were(send: Any) -> None:
    for sent, array in zip(send(ARRAYS, CPU), ARRAYS, strict=True):
        np.testing.assert_array_equal(sent.numpy(), array)
        assert sent.numpy().dtype == array.dtype
        # compiled kernels expect it there
        assert send == transfer.send_together or sent.data_ptr() % transfer.ALIGNMENT == 0
