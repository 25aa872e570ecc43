"""What all tests share."""

from __future__ import annotations

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
