"""Small encoders, of this library and of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vicreg_hf import VICRegConfig, VICRegModel


def vicreg(**model_args: Any) -> VICRegModel:
    torch.manual_seed(0)
    name = model_args.pop("architecture", "test_resnet")
    config = VICRegConfig(architecture=name, model_args=model_args or None, expander_dims=[8])
    return VICRegModel(config).eval()


def vit(path: Path, *, pooler: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=48, patch_size=16,
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=pooler).eval()
    model.save_pretrained(path)
    transformers.ViTImageProcessor(
        size={"height": 48, "width": 48}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    ).save_pretrained(path)
    return model


def resnet(path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(path)
