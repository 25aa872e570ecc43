"""The lines in the terminal, and the expected duration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from vicreg_hf import PretrainingArguments
from vicreg_hf.training.monitoring import progress
from vicreg_hf.training.monitoring.log import MetricsLog
from vicreg_hf.training.monitoring.progress import Progress, duration, line_of

FIRST = {"step": 0, "knn": 0.317, "knn_pixels": 0.454, "knn_images": "test"}
LOSS = {"loss": 18.24, "invariance": 0.081, "variance": 0.552, "covariance": 1.71}
KNN = {"knn": 0.612, "knn_images": "test"}


@pytest.mark.parametrize(
    ("row", "first", "left", "expected"),
    [
        (
            {"step": 200, **LOSS, "views_per_second": 2899.6, **KNN}, FIRST, 245.0,
            "step 200/1560  loss 18.2 (invariance 0.081, variance 0.55, covariance 1.7)  "
            "20-NN 61.2 % (start 31.7, pixels 45.4)  2,900 views/s  4 min left",
        ),
        (FIRST, FIRST, None, "step 0/1560  20-NN 31.7 % (pixels 45.4)"),
        (
            {"step": 50, **KNN, "probe": 0.5}, {**FIRST, "knn_images": "other"}, 40.0,
            "step 50/1560  20-NN 61.2 %  probe 50.0 %  40 s left",
        ),
        (
            {"step": 1560, **LOSS, "loss": 1234.5, "covariance": 456.7, "views_per_second": 4.26},
            {}, 0.0, "step 1560/1560  loss 1,234 (invariance 0.081, variance 0.55, covariance 457)"
            "  4.3 views/s",
        ),
    ],
)  # fmt: skip
def test_a_row_is_a_line(
    row: dict[str, Any], first: dict[str, Any], left: float | None, expected: str
) -> None:
    assert line_of(row, total_steps=1560, first=first, left=left) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.43, "0.43 s"), (40.2, "40 s"), (59.6, "1 min"), (3599, "1 h"), (11400, "3 h 10 min"),
     (172_800 + 5 * 3600, "2 d 5 h")],
)  # fmt: skip
def test_durations_are_in_units_that_people_take(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def at_step_15(total_steps: int, seconds: float, folder: Path, **settings: Any) -> Progress:
    """After 10 timed steps of so many seconds, and 100 seconds of kNN."""
    args = PretrainingArguments(architecture="resnet18", expander_dims="32", **settings)
    log = MetricsLog(folder / "metrics.jsonl", enabled=True)
    found = Progress(
        args,
        log,
        total_steps=total_steps,
        measures=True,
        terms=("invariance", "variance", "covariance"),
        on_cpu=True,
    )
    found.step, found.timed_steps, found.paused, found.last_pause = 15, 10, 100, 100
    found.begun = time.perf_counter() - 10 * seconds - 100
    return found


@pytest.mark.parametrize(("total", "knn_steps", "times"), [(40, 10, 3), (45, 10, 4), (45, None, 1)])
def test_measurements_count_as_often_as_they_come(
    total: int, knn_steps: int | None, times: int, tmp_path: Path
) -> None:
    found = at_step_15(total, 7, tmp_path, knn_steps=knn_steps)
    assert found.seconds_left == pytest.approx((total - 15) * 7 + times * 100, rel=0.01)


def test_long_runs_on_a_cpu_are_told_of_its_recipes(tmp_path: Path) -> None:
    long = at_step_15(1015, 60, tmp_path, dataset_name="cells").expectation()
    assert long.startswith("Expected duration of the 1,000 steps that are left: 16 h 4")
    assert ": --config " in long
    assert "tiny-cpu (CIFAR-10 or images like it)" in long
    assert "small-data " not in long  # which is for a GPU
    assert "demo" not in long  # which brings its own images
    short = at_step_15(25, 60, tmp_path, dataset_name="cells").expectation()
    assert short.endswith("that are left: 12 min, at 1 min a step.")


def test_duration_is_said_once_after_the_first_steps_and_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.0)
    log = MetricsLog(tmp_path / "metrics.jsonl", enabled=True)
    shown = Progress(
        PretrainingArguments(),
        log,
        total_steps=10,
        measures=False,
        terms=("invariance", "variance", "covariance"),
        on_cpu=False,
    )
    for step in shown.bar(range(1, 11), step=0):
        shown.tick(step)
        if step % 4 == 0:
            log.add({"step": step, **LOSS})
    printed = capsys.readouterr()
    lines = [line.split("  ")[0].split(":")[0] for line in printed.out.splitlines()]
    said = "Expected duration of the 4 steps that are left"
    assert lines == ["step 4/10", said, "step 8/10"]
    assert printed.err == ""  # no bar where nobody watches
