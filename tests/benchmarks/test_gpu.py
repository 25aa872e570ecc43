"""The command for ten minutes on one GPU, rehearsed without one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from warm import run_script

from vicreg_hf.benchmarks.gpu import DONE, PARTS, gpu
from vicreg_hf.benchmarks.measuring import table

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def rehearsed(output_dir: Path, *only: str) -> list[dict[str, Any]]:
    """What the command writes for some parts."""
    words = ["gpu", "--rehearse", f"--output_dir={output_dir}", "--only", *only]
    result = run_script("scripts/benchmark.py", *words)
    found = json.loads((output_dir / "results.json").read_text())
    assert result.returncode == 0, [each for each in found if each["status"] != DONE]
    written = (output_dir / "results.md").read_text()
    for each in found:
        assert each["status"] == DONE
        assert f"| {each['part']} | done |" in written
        assert f"| {each['part']} | done |" in result.stdout
        assert each["result"] is None or each["result"] in written
    return found


def test_a_part_is_rehearsed_and_its_table_written(tmp_path: Path) -> None:
    (found,) = rehearsed(tmp_path, "loss")
    ((n, dim, milliseconds, *_),) = found["tables"][0]["rows"]
    assert (n, dim) == ("16", "8")
    assert float(milliseconds) > 0


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, *PARTS)
    assert [each["part"] for each in found] == list(PARTS)
    assert all(table["rows"] for each in found for table in each["tables"])
    (checks,) = found[0]["tables"]
    assert {outcome for _, outcome, _ in checks["rows"]} == {"passed"}


def disturbed(words: Sequence[str]) -> str:
    """A measurement that fails of the loss, does not end for inputs, and else has a row."""
    found = table(["what", "how much"], [[words[0], "1"]])
    print(found, flush=True)
    if words[0] == "loss":
        raise ValueError("it cannot be measured")
    time.sleep(600 if words[0] == "data" else 0)
    return found


def test_what_fails_or_is_cut_is_told_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["loss", "input", "extraction"]
    with pytest.raises(SystemExit):
        gpu(disturbed, minutes=0.05, output_dir=str(tmp_path), only=only, rehearse=True)
    loss, inputs, extraction = json.loads((tmp_path / "results.json").read_text())
    assert loss["status"] == "failed with status 1"
    assert "ValueError: it cannot be measured" in loss["printed"]
    assert inputs["status"].startswith("cut after ")
    assert inputs["tables"] == [{"header": ["what", "how much"], "rows": [["data", "1"]]}]
    assert extraction["status"] == DONE
    printed = capsys.readouterr().out
    for part in (loss, inputs, extraction):
        assert f"| {part['part']} | {part['status']} |" in printed


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none; --rehearse runs"):
        gpu(disturbed, minutes=9, output_dir=str(tmp_path), only=["loss"], rehearse=False)
    with pytest.raises(ValueError, match="minutes must be above 0 and at most 60, got 0"):
        gpu(disturbed, minutes=0, output_dir=str(tmp_path), only=["loss"], rehearse=True)
