"""The command for ten minutes on one GPU, rehearsed without one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from warm import run_script

from vicreg_hf.benchmarks.gpu import DONE, PARTS, STOPPED, gpu
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
        gpu(disturbed, minutes=0.15, output_dir=str(tmp_path), only=only, rehearse=True)
    loss, inputs, extraction = json.loads((tmp_path / "results.json").read_text())
    assert loss["status"] == "failed with status 1"
    assert "ValueError: it cannot be measured" in loss["printed"]
    assert inputs["status"].startswith("cut after ")
    assert inputs["tables"] == [{"header": ["what", "how much"], "rows": [["data", "1"]]}]
    assert extraction["status"] == DONE
    printed = capsys.readouterr().out
    for part in (loss, inputs, extraction):
        assert f"| {part['part']} | {part['status']} |" in printed


def test_a_scheduler_that_ends_it_leaves_results_and_no_process(tmp_path: Path) -> None:
    only, pids = ["loss", "input", "extraction"], tmp_path / "pids"

    def measure(words: Sequence[str]) -> str:
        pids.write_text(str(os.getpid()))
        return disturbed(["features" if words[0] == "loss" else words[0]])

    settings = {"minutes": 9, "output_dir": str(tmp_path), "only": only, "rehearse": True}
    command = get_context("fork").Process(target=gpu, args=(measure,), kwargs=settings)
    command.start()
    log = tmp_path / "log.txt"
    while not (log.is_file() and "| data | 1 |" in log.read_text()):
        time.sleep(0.05)
    os.kill(command.pid or 0, signal.SIGTERM)
    command.join()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [each["status"] for each in found] == [DONE, STOPPED]
    assert found[1]["tables"][0]["rows"] == [["data", "1"]]
    assert command.exitcode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none; --rehearse runs"):
        gpu(disturbed, minutes=9, output_dir=str(tmp_path), only=["loss"], rehearse=False)
    with pytest.raises(ValueError, match="minutes must be above 0 and at most 60, got 0"):
        gpu(disturbed, minutes=0, output_dir=str(tmp_path), only=["loss"], rehearse=True)
