"""Training on several processes, measured."""

from __future__ import annotations

import pytest
from warm import run_script

from vicreg_hf.benchmarks.commands import measure

SMALLEST = ["--architecture=test_resnet", "--batch_size=8", "--expander_dims=16-16"]


@pytest.mark.slow
def test_each_number_of_processes_shares_the_batch() -> None:
    flags = [*SMALLEST, "--processes", "1", "2", "--steps=2", "--rounds=1"]
    result = run_script("scripts/benchmark.py", "scale", *flags)
    assert result.returncode == 0, result.stderr
    assert "8 images of 32 pixels in all" in result.stdout
    rows = [line[2:-2].split(" | ") for line in result.stdout.splitlines() if line[:2] == "| "]
    (_, *one), (_, *two) = rows[2:]
    assert (one[0], two[0]) == ("8", "4")
    assert one[-1] == "100 %"
    share = 100 * float(one[1]) / float(two[1]) / 2
    assert float(two[-1].removesuffix(" %")) == pytest.approx(share, abs=1)


def test_processes_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="evenly, got 3 processes and batch_size=8"):
        measure(["scale", *SMALLEST, "--processes", "1", "3"])
