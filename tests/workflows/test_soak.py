"""The soak as a test, for `pytest -m slow`; `python tests/helpers/soak.py` takes settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from soak import soak


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disturbed_run_ends_as_an_undisturbed_one(processes: int, tmp_path: Path) -> None:
    minutes = float(os.environ.get("SOAK_MINUTES", "5"))
    seed = int(os.environ.get("SOAK_SEED", "0"))
    said = soak(tmp_path, minutes=minutes, seed=seed, steps=600, processes=processes)
    print(said)
    assert "ended as undisturbed" in said
