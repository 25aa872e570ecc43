"""Measurements as they are shown and kept."""

from __future__ import annotations

import json

import pytest

from vicreg_hf.evaluation.measurements import Measurement


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (Measurement("knn", "a", 0.71236, 50, 0), "71.24 %"),
        (Measurement("knn", "a", 0.71236, 50, 0, low=0.7, high=0.7251), "71.24 % (70.00 to 72.51)"),
        (Measurement("knn", "a", 0.0, 50, 0, low=0.0, high=0.0), "0.00 % (0.00 to 0.00)"),
        (Measurement("collapse", "rank", 123.4567, 50, 0, percent=False), "123.5"),
    ],
)
def test_a_measurement_is_shown_with_its_interval(measurement: Measurement, expected: str) -> None:
    assert measurement.shown == expected


def test_a_measurement_survives_json() -> None:
    measurement = Measurement(
        "linear", "top-1 accuracy", 0.5, 10, 3, {"epochs": 30}, 0.4, 0.6,
        details={"tried": [{"learning_rate": 0.1}]},
    )  # fmt: skip
    read = json.loads(json.dumps(measurement.to_dict(), allow_nan=False))
    assert Measurement(**read) == measurement
    assert list(read)[:3] == ["protocol", "name", "value"]
