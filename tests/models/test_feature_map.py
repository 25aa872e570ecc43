"""Feature maps of timm backbones, compared with those that timm itself lays out."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from vicreg_hf.models.feature_map import feature_map

SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4]}  # fmt: skip


@pytest.mark.parametrize(("name", "model_args", "size"), [
    ("test_resnet", {}, (64, 96)),  # channels first
    ("test_convnext", {}, (64, 64)),
    ("test_mambaout", {}, (64, 96)),  # channels last
    ("swin_tiny_patch4_window7_224", SWIN, (64, 64)),
    ("test_vit", {"img_size": (48, 80)}, (48, 80)),  # a class token, and more columns than rows
    ("test_vit", {"dynamic_img_size": True, "dynamic_img_pad": True}, (60, 90)),
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "reg_tokens": 4}, (64, 64)),
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "class_token": False,
                              "global_pool": "avg"}, (64, 64)),
    ("coat_lite_tiny", {"img_size": 64}, (64, 64)),  # does not say that it has a class token
    ("levit_128s", {}, (224, 224)),  # no class token, which it does not say either
])  # fmt: skip
def test_the_map_is_the_one_that_timm_lays_out(
    name: str, model_args: dict[str, Any], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    backbone: Any = timm.create_model(name, num_classes=0, **model_args).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        found = feature_map(backbone, backbone.forward_features(images), size)
        (timms,) = backbone.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
    assert found.shape[:2] == (2, backbone.num_features)
    torch.testing.assert_close(found, timms)


@pytest.mark.parametrize("name", ["pit_ti_224", "crossvit_tiny_240"])
def test_a_backbone_without_a_map_is_refused(name: str) -> None:
    with torch.device("meta"):
        backbone: Any = timm.create_model(name, num_classes=0)
        side = backbone.pretrained_cfg["input_size"][-1]
        features = backbone.forward_features(torch.empty(1, 3, side, side))
    with pytest.raises(ValueError, match=f"must have a feature map of .* {name} returns"):
        feature_map(backbone, features, (side, side))
