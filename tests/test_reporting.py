"""What a run says of itself."""

from __future__ import annotations

import pytest

from vicreg_hf import PretrainingArguments
from vicreg_hf.reporting import introduction


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
    said = introduction(
        args, parameters=11_176_512, images=images, step=step, total_steps=1200, hardware="a GPU"
    )
    assert said == (
        f"Pretraining resnet18 (11.2 million parameters, expander 64-32) on {data}, 32 pixels: "
        f"{steps}, 256 images each, on a GPU, into runs/a."
    )
