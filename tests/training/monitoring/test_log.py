"""The metrics log, and the first message of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vicreg_hf import PretrainingArguments
from vicreg_hf.training.monitoring.log import MetricsLog
from vicreg_hf.training.monitoring.summary import first_message


@pytest.mark.parametrize(
    ("step", "images", "data", "steps"),
    [
        (0, 20_000, "20,000 images of demo", "1,200 steps"),
        (400, 20_000, "20,000 images of demo", "steps 401 to 1,200"),
        (1200, None, "the stream demo", "none of 1,200 steps left"),
    ],
)
def test_a_run_says_what_it_trains_on_what_and_how_long(
    step: int, images: int | None, data: str, steps: str
) -> None:
    args = PretrainingArguments(
        architecture="resnet18", image_size=32, expander_dims="64-32", output_dir="runs/a"
    )
    said = first_message(
        args, parameters=11_176_512, images=images, step=step, total_steps=1200, hardware="a GPU"
    )
    assert said == (
        f"Pretraining resnet18 (11.2 million parameters, expander 64-32) on {data}, 32 pixels: "
        f"{steps}, 256 images each, on a GPU, into runs/a."
    )


def test_every_row_is_json_whatever_its_numbers(tmp_path: Path) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    log = MetricsLog(tmp_path / "metrics.jsonl", enabled=True)
    log.add({"step": 1, "loss": 0.5, "grad_norm": math.inf})
    log.add({"step": 2, "loss": math.nan, "grad_norm": 0.25})
    for _ in range(2):
        lines = log.path.read_text().splitlines()
        assert [json.loads(line, parse_constant=refuse) for line in lines] == [
            {"step": 1, "loss": 0.5, "grad_norm": None},
            {"step": 2, "loss": None, "grad_norm": 0.25},
        ]
        first, second = log.rows()
        assert (first["loss"], second["grad_norm"]) == (0.5, 0.25)
        assert math.isnan(first["grad_norm"])
        assert math.isnan(second["loss"])
        log.keep_until(2)
