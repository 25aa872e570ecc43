"""Where the checks of `pytest -m gpu` run: on a GPU, or tiny on the CPU with --rehearse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment


@pytest.fixture(scope="session", autouse=True)
def pair() -> Iterator[Pool]:
    """Two processes, which begin before this one uses a GPU: a fork could not use it any more."""
    with get_context("fork").Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session", autouse=True)
def device(pytestconfig: pytest.Config, pair: Pool) -> torch.device:  # noqa: ARG001 - which comes first
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not pytestconfig.option.rehearse:
        pytest.skip("torch sees no GPU; --rehearse runs this on the CPU at tiny size")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def tiny(device: torch.device) -> bool:
    """Whether this is a rehearsal on the CPU, where sizes are small."""
    return device.type == "cpu"


@pytest.fixture(params=["no", "bf16", "fp16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """A mixed precision, as `accelerate launch` sets it."""
    with launched(request.param):
        yield request.param


@pytest.fixture
def fp16() -> Iterator[None]:
    with launched("fp16"):
        yield


@contextmanager
def launched(precision: str) -> Iterator[None]:
    forget_accelerator()
    with patch_environment(ACCELERATE_MIXED_PRECISION=precision):
        yield
    forget_accelerator()


def forget_accelerator() -> None:
    """Let the next run choose its precision, which accelerate fixes once for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
