"""What all tests share."""

from __future__ import annotations

import os
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
# What pretraining starts takes all cores it is allowed: with several test processes, one each.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()
