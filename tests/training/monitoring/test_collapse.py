"""Warnings of collapse, from runs that collapse for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workflow import train

from vicreg_hf import PretrainingArguments
from vicreg_hf.training.monitoring.collapse import LEAST_STD, CollapseWatch

pytestmark = pytest.mark.usefixtures("one_core")
FAST = ["--batch_size=32", "--image_size=16", "--optimizer=adamw", "--base_lr=4e-2",
        "--logging_steps=10"]  # fmt: skip
"""Settings with which embeddings collapse within 200 steps if a term of the loss is missing."""


COLLAPSES = [
    ("--std_coeff=0", "their std is 0.0", "raise --std_coeff, now 0, to --sim_coeff, 25"),
    ("--cov_coeff=0", "their effective rank is 1.", "raise --cov_coeff, now 0; the authors'"),
]


@pytest.mark.parametrize(
    ("flag", "found", "remedy"), [COLLAPSES[0], pytest.param(*COLLAPSES[1], marks=pytest.mark.slow)]
)
def test_a_run_without_one_of_its_terms_is_warned_of_that(
    flag: str, found: str, remedy: str, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train(images, tmp_path, *FAST, "--max_steps=200", flag)
    printed = capsys.readouterr().err
    assert printed.count("embeddings have collapsed") == 1
    assert found in printed
    assert remedy in printed


@pytest.mark.slow
def test_a_run_with_all_terms_is_not_warned(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(images, tmp_path, *FAST, "--max_steps=200")
    assert "collapsed" not in capsys.readouterr().err


def row(step: int, std: float = 1.0, rank: float = 30.0) -> dict[str, Any]:
    return {"step": step, "embedding_std": std, "effective_rank": rank}


def watch(*rows: dict[str, Any], **changes: Any) -> CollapseWatch:
    values = {"batch_size": 64, "expander_dims": "64-64", "warmup_epochs": 0.0} | changes
    return CollapseWatch(PretrainingArguments(**values), 10, rows)


def steps_warned(watch: CollapseWatch, rows: list[dict[str, Any]]) -> list[int]:
    """Steps whose rows bring a warning."""
    return [entry["step"] for entry in rows if watch.warning_for(entry)]


SMALL_STD = LEAST_STD / 2


def test_it_takes_five_rows_and_a_hundred_steps() -> None:
    assert steps_warned(watch(), [row(step, SMALL_STD) for step in range(1, 300)]) == [101]
    assert steps_warned(watch(), [row(50 * n, SMALL_STD) for n in range(1, 10)]) == [250]
    assert steps_warned(watch(), [row(step, rank=1.5) for step in range(1, 300)]) == [101]


def test_rows_of_the_warm_up_do_not_count() -> None:
    rows = [row(step, SMALL_STD) for step in range(1, 300)]
    assert steps_warned(watch(warmup_epochs=10.0), rows) == [201]


def test_it_is_said_again_only_after_a_recovery() -> None:
    bad = [row(50 * n, SMALL_STD) for n in range(1, 7)]
    rows = [*bad, row(350), *(row(300 + entry["step"], SMALL_STD) for entry in bad)]
    assert steps_warned(watch(), rows) == [250, 550]


def test_a_resumed_run_takes_up_where_it_was() -> None:
    rows = [row(50 * n, SMALL_STD) for n in range(1, 10)]
    assert steps_warned(watch(*rows[:3]), rows[3:]) == [250]
    assert steps_warned(watch(*rows[:6]), rows[6:]) == []  # said before


def test_rows_without_metrics_of_embeddings_are_passed_over() -> None:
    assert watch().warning_for({"step": 0, "knn": 0.5}) is None


def test_large_steps_and_narrow_expanders_are_named_where_the_weights_are_right() -> None:
    for entry, words in ((row(0, SMALL_STD), "--warmup_epochs"), (row(0, rank=1), "expander_dims")):
        said = [
            watch_.warning_for(entry | {"step": n}) for watch_ in [watch()] for n in range(1, 200)
        ]
        sentence = next(filter(None, said))
        assert words in sentence
        assert "lower --base_lr" in sentence
