"""The pictures of a model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workflow import train, write_images

from vicreg_hf import PretrainingArguments
from vicreg_hf.training.building.data import open_training_data
from vicreg_hf.training.monitoring.pictures import (
    RIGHT,
    WRONG,
    Shown,
    below_neighbour,
    draw_loss_terms,
    draw_retrievals,
    draw_spectrum,
    relative_spectrum,
)


def inked(path: Path) -> int:
    """Pixels that are coloured, as curves and their marks are and axes are not."""
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=2) > 60).sum())


def test_curves_of_few_points_have_marks(tmp_path: Path) -> None:
    rows = [{"step": k, "loss": float(k % 3)} for k in range(200)]
    found = []
    for count in (20, 200):
        draw_loss_terms(rows[:count], ["loss"], tmp_path / f"{count}.png")
        found.append(inked(tmp_path / f"{count}.png"))
    draw_loss_terms(rows[:1], ["loss"], tmp_path / "1.png")
    assert inked(tmp_path / "1.png") > 5  # a mark
    assert min(found) > 500


@pytest.mark.parametrize(
    ("rows", "width", "told"), [(50, 8, "all 8"), (6, 8, "5 of 8, for so few images")]
)
def test_the_spectrum_stops_where_no_more_can_be_seen(
    rows: int, width: int, told: str, tmp_path: Path
) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    said = draw_spectrum({"representations": x}, tmp_path / "s.png")
    assert said == f"the centred representations ({told})"
    singular = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)[: min(rows - 1, width)]
    assert relative_spectrum(x).numpy() == pytest.approx(singular / singular[0], rel=1e-4)


def test_features_that_span_less_are_not_drawn_as_rounding(tmp_path: Path) -> None:
    x = torch.randn(40, 3) @ torch.randn(3, 8)
    said = draw_spectrum({"embeddings": x}, tmp_path / "s.png")
    assert said == "the centred embeddings (all 8, of which 5 are 0)"
    assert draw_spectrum({"embeddings": torch.ones(40, 8)}, tmp_path / "s.png") is None
    assert not (tmp_path / "s.png").exists()


def test_neighbours_say_how_near_they_are_and_of_which_class(tmp_path: Path) -> None:
    assert below_neighbour(0.987, "cat", "cat") == ("0.99 ✓", RIGHT)
    assert below_neighbour(0.5, "cat", "dog") == ("0.50 ✗", WRONG)
    assert below_neighbour(0.5, None, "dog") == below_neighbour(0.5, "cat", None)
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for names, coloured in ((["$c_a$t", "dog", "猫"], True), ([None] * 3, False)):
        bank = Shown(images, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), names)
        query = Shown(images[:1], torch.tensor([[2.0, 0.0]]), names[:1])
        assert draw_retrievals(query, bank, tmp_path / "r.png") is coloured
        assert (inked(tmp_path / "r.png") > 500) is coloured


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (45, 2), (10**6, 50)])
def test_short_runs_log_enough_rows_for_a_curve(steps: int, every: int, images: Path) -> None:
    args = PretrainingArguments(dataset_name=str(images), batch_size=16, max_steps=steps)
    assert open_training_data(args)[0].logging_steps == every


@pytest.mark.usefixtures("one_core")
def test_a_run_shows_feature_maps_and_no_curve_of_one_point(tmp_path: Path) -> None:
    data, run = write_images(tmp_path / "images", rows=32), tmp_path / "run"
    fine = '--model_args={"output_stride": 8}'  # a map that shows something
    train(data, run, "--max_steps=1", fine)
    card = (run / "encoder" / "README.md").read_text()
    assert "loss_terms.png" not in card
    assert "pictures/feature_maps.png" in card
    assert inked(run / "encoder" / "pictures" / "feature_maps.png") > 500
