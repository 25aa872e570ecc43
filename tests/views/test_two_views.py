"""Views as the published encoder asks of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from vicreg_hf import TwoViews, VICRegConfig, VICRegModel
from vicreg_hf.views.presets import ViewRecipe

NOTHING = ViewRecipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)


def model(architecture: str, **model_args: Any) -> VICRegModel:
    config = VICRegConfig(
        architecture=architecture, model_args=model_args or None, expander_dims=[8]
    )
    return VICRegModel(config)


@pytest.mark.parametrize(
    ("architecture", "model_args", "size", "expected"),
    [
        ("test_resnet", {}, 32, 32),
        ("test_resnet", {}, None, 160),
        ("test_vit", {"img_size": 64, "in_chans": 1}, None, 64),
        ("test_vit", {"img_size": 64}, 64, 64),
    ],
)
def test_a_published_encoder_sees_images_as_its_views_were(
    architecture: str, model_args: dict[str, Any], size: int | None, expected: int, tmp_path: Path
) -> None:
    made = model(architecture, **model_args)
    if size is not None:
        made.set_image_size(size)
    before = made.config.to_dict()
    views = TwoViews.for_model(made, (NOTHING, NOTHING), image_size=size)
    assert made.config.to_dict() == before  # it leaves the model alone
    assert made.config.pretrained_cfg is not None
    channels = made.config.pretrained_cfg["input_size"][0]
    grey = torch.full((1, channels, 200, 200), 77, dtype=torch.uint8)
    x, _ = views(grey)
    assert x.shape == (1, channels, expected, expected)
    made.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    shown = Image.fromarray(grey[0].permute(1, 2, 0).squeeze().numpy())
    torch.testing.assert_close(processor(shown, return_tensors="pt")["pixel_values"], x)


def test_another_size_is_asked_of_the_model_and_not_of_its_views() -> None:
    made = model("test_vit", img_size=64)
    with pytest.raises(ValueError, match=r"asks for, 64, got 32; call model.set_image_size\(32\)"):
        TwoViews.for_model(made, image_size=32)
    with pytest.raises(ValueError, match="must be the backbone's img_size, 64, got 32; build the"):
        made.set_image_size(32)
