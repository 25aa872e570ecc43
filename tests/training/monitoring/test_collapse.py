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
        "--logging_steps=10", "--max_steps=160"]  # fmt: skip
"""Settings with which embeddings collapse if a term of the loss is missing."""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--std_coeff=0"], ["their std is 0.0", "raise --std_coeff, now 0, to --sim_coeff, 25"]),
        pytest.param(
            ["--cov_coeff=0"],
            ["their effective rank is 1.", "raise --cov_coeff, now 0; the authors'"],
            marks=pytest.mark.slow,
        ),
        pytest.param([], [], marks=pytest.mark.slow),
    ],
)
def test_a_run_without_one_of_its_terms_is_warned_of_that(
    flags: list[str], words: list[str], images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train(images, tmp_path, *FAST, *flags)
    printed = capsys.readouterr().err
    assert printed.count("embeddings have collapsed") == len(flags)
    for found in words:
        assert found in printed


def row(step: int, std: float = 1.0, rank: float = 30.0) -> dict[str, Any]:
    return {"step": step, "embedding_std": std, "effective_rank": rank}


def watch(*rows: dict[str, Any], **changes: Any) -> CollapseWatch:
    values = {"batch_size": 64, "expander_dims": "64-64", "warmup_epochs": 0.0} | changes
    return CollapseWatch(PretrainingArguments(**values), 10, rows)


def steps_warned(watch: CollapseWatch, rows: list[dict[str, Any]]) -> list[int]:
    """Steps whose rows bring a warning."""
    return [entry["step"] for entry in rows if watch.warning_for(entry)]


SMALL_STD = LEAST_STD / 2
BAD = [row(50 * n, SMALL_STD) for n in range(1, 10)]


def test_it_takes_five_rows_and_a_hundred_steps_after_the_warm_up() -> None:
    rows = [row(step, SMALL_STD) for step in range(1, 300)]
    assert steps_warned(watch(), rows) == [101]
    assert steps_warned(watch(), BAD) == [250]
    assert steps_warned(watch(), [row(step, rank=1.5) for step in range(1, 300)]) == [101]
    assert steps_warned(watch(warmup_epochs=10.0), rows) == [201]


def test_it_is_said_again_only_after_a_recovery_also_in_a_resumed_run() -> None:
    rows = [*BAD[:6], row(350), *(row(300 + entry["step"], SMALL_STD) for entry in BAD[:6])]
    assert steps_warned(watch(), rows) == [250, 550]
    assert steps_warned(watch(*BAD[:3]), BAD[3:]) == [250]
    assert steps_warned(watch(*BAD[:6]), BAD[6:]) == []  # said before
    assert watch().warning_for({"step": 0, "knn": 0.5}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [({"embedding_std": SMALL_STD}, "--warmup_epochs"), ({"effective_rank": 1}, "expander_dims")],
)
def test_large_steps_and_narrow_expanders_are_named_where_the_weights_are_right(
    change: dict[str, float], words: str
) -> None:
    own = watch()
    sentence = next(filter(None, (own.warning_for(row(n) | change) for n in range(1, 200))))
    assert words in sentence
    assert "lower --base_lr" in sentence
