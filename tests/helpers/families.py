"""One small model of every kind of backbone, and what it is given."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from vicreg_hf import VICRegConfig, VICRegModel

# One of every kind of backbone, small: name in timm -> arguments.
FAMILIES: dict[str, dict[str, Any] | None] = {
    "test_resnet": None,
    "resnet10t": {"global_pool": "catavgmax"},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "test_convnext": None,
    "test_efficientnet": None,
    "mobilenetv4_conv_small": None,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 2, "embed_dim": 24, "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
    },
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "test_mambaout": None,
    "test_byobnet": None,
    "test_nfnet": None,
}  # fmt: skip
FIXED_SIZES = {"test_vit": 32, "swin_tiny_patch4_window7_224": 32, "eva02_tiny_patch14_224": 28}


def config(architecture: str = "test_resnet", **settings: Any) -> VICRegConfig:
    settings = {"model_args": FAMILIES.get(architecture), "expander_dims": [8, 6]} | settings
    return VICRegConfig(architecture=architecture, **settings)


def trained(architecture: str = "test_resnet", **settings: Any) -> VICRegModel:
    """A model whose every parameter and running statistic differs from its initial value."""
    torch.manual_seed(0)
    model = VICRegModel(config(architecture, **settings))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.mul_(1 + torch.rand_like(tensor))
            elif tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
    return model.eval()


def pixels(architecture: str = "test_resnet", *, batch: int = 2, seed: int = 0) -> Tensor:
    side = FIXED_SIZES.get(architecture, 64)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def photograph() -> Image.Image:
    noise = torch.randint(256, (3, 10, 14), generator=torch.Generator().manual_seed(0))
    return tv.to_pil_image(noise.to(torch.uint8)).resize((200, 150))


def same_state(model: nn.Module, other: nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
