"""What all tests share."""

from __future__ import annotations

import os

# Tests compare bits and two processes with one, as a CPU gives them: also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from gloo import GlooPool

# The same examples in every run, and no limit on the time one takes.
hypothesis.settings.register_profile("vicreg", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("vicreg")

# Models here are tiny: threads would spend their time waiting for each other on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Keep what a module starts to one core, where many steps would wait for other tests' threads.

    Not for loading workers: torch advises against more of them than cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)
