"""The picture of what the model will see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from workflow import write_images

from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.monitoring.preview import (
    GAP,
    draw_preview,
    empty_views,
    picture_of_views,
)


def tiles(path: Path, side: int) -> np.ndarray:
    """(rows, 3, side, side, 3) uint8, without the lines of text above."""
    sheet = np.array(Image.open(path))
    sheet = sheet[(len(sheet) - GAP) % (side + GAP) + GAP :, GAP:]
    rows, columns = sheet.shape[0] // (side + GAP), sheet.shape[1] // (side + GAP)
    cut = sheet[: rows * (side + GAP), : columns * (side + GAP)]
    cut = cut.reshape(rows, side + GAP, columns, side + GAP, 3).transpose(0, 2, 1, 3, 4)
    return cut[:, :, :side, :side]


def test_images_stand_beside_their_views_and_nothing_else_is_written(tmp_path: Path) -> None:
    still: dict[str, Any] = dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), 0)
    args = PretrainingArguments(
        dataset_name=str(write_images(tmp_path / "images", rows=16, size=(120, 120), bad=[10])),
        batch_size=16, output_dir=str(tmp_path / "run"), image_size=120,
        augmentation=still | {"scale": [1, 1], "ratio": [1, 1]},
    )  # fmt: skip
    said: list[str] = []
    drawn = tiles(draw_preview(args, tmp_path / "new/views.png", say=said.append), 120)
    assert said == ["images (train): 16 images, 2 classes, 1 unreadable file."]
    assert not (tmp_path / "run").exists()
    assert drawn.shape[:2] == (8, 3)
    assert len({tile.tobytes() for tile in drawn[:, 0]}) == 8
    assert np.abs(drawn[:, 1:].astype(int) - drawn[:, :1]).max() <= 1


def test_any_views_stand_in_a_row_and_smaller_ones_in_the_middle(tmp_path: Path) -> None:
    image = torch.full((3, 50, 100), 9, dtype=torch.uint8)
    views = [torch.full((2, 3, side, side), side / 255) for side in (100, 100, 40, 120)]
    picture_of_views([image, image[:, :, :50]], views).save(tmp_path / "views.png")
    drawn = tiles(tmp_path / "views.png", 120)
    assert drawn.shape[:2] == (2, 5)
    for column, (side, shown) in enumerate([(100, 100), (100, 100), (40, 120), (120, 120)], 1):
        edge = (120 - shown) // 2
        expected = np.full((2, 120, 120, 3), 255)
        expected[:, edge : 120 - edge, edge : 120 - edge] = side
        np.testing.assert_array_equal(drawn[:, column], expected)
    assert (drawn[0, 0, :30] == 255).all()
    assert (drawn[0, 0, 30:90] == 9).all()


def test_rows_of_small_gray_views_are_large_enough_to_see(tmp_path: Path) -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    views = [torch.eye(side).view(1, 1, side, side) for side in (32, 16)]
    picture_of_views([image], views).save(tmp_path / "views.png")
    drawn = tiles(tmp_path / "views.png", 96)
    assert drawn.shape[:2] == (1, 3)
    for column, factor in ((1, 3), (2, 6)):
        eye = np.kron(np.eye(96 // factor), np.ones((factor, factor))) * 255
        np.testing.assert_array_equal(drawn[0, column], np.repeat(eye[..., None], 3, 2))


@pytest.mark.parametrize("name", ["views", "views.txt"])
def test_a_file_that_is_no_picture_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preview must be a file such as views.png, got"):
        draw_preview(PretrainingArguments(), tmp_path / name)


def test_views_and_photographs_that_show_nothing_are_named() -> None:
    noise = torch.rand(3, 8, 8)
    images = [(255 * noise).byte(), torch.full((3, 8, 8), 120, dtype=torch.uint8)]
    views = [torch.stack([noise, 0 * noise]), torch.stack([0.02 * noise, noise])]
    photographs, lost = empty_views(images, views)
    assert photographs == "photograph 2 (of one colour) shows nothing."
    assert lost.startswith("1 of 4 views show nothing, and nothing is learned from them: view 2 of")
    assert "photograph 1 (black); choose another --augmentation" in lost
    views[1][0] = 0.5 + 0.01 * noise
    assert "view 2 of photograph 1 (of one colour)" in empty_views(images, views)[1]
    assert empty_views(images[:1], [noise[None], noise[None]]) == []
