"""ResNets that timm lacks, registered with timm when this is imported.

timm's plain stem is 7 x 7 with stride 2 and 64 channels whatever its arguments, so these have a
stem of their own. A repository that holds one says so: its architecture carries the tag
`needs_import_vicreg_hf`, which timm and transformers show when they do not know it.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_conv
from torch import nn

TAG = "needs_import_vicreg_hf"

_IMAGENET = {
    "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
    "interpolation": "bilinear", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1", "classifier": "fc", "num_classes": 1000,
}  # fmt: skip
_CIFAR = _IMAGENET | {
    "input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0, "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "num_classes": 10,
}  # fmt: skip

default_cfgs = generate_default_cfgs(
    {
        f"resnet18_cifar.{TAG}": _CIFAR,
        f"resnet50x2.{TAG}": _IMAGENET,
        f"resnet200x2.{TAG}": _IMAGENET,
    }
)


def is_ours(architecture: str) -> bool:
    """Say whether timm knows an architecture only after `import vicreg_hf`."""
    return architecture.partition(".")[0] in default_cfgs


def published_name(architecture: str) -> str:
    """Name an architecture for config.json, with the tag if it needs `import vicreg_hf`."""
    return f"{architecture}.{TAG}" if is_ours(architecture) else architecture


class CifarResNet(ResNet):
    """A ResNet for small images: the stem is 3 x 3 with stride 1, and there is no max-pooling."""

    def __init__(self, *args: Any, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, stride=1, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.feature_info[0]["reduction"] = 1
        for stage, reduction in zip(self.feature_info[1:], (1, 2, 4, 8), strict=True):
            stage["reduction"] = reduction
        self.init_weights()


class WideResNet(ResNet):
    """A ResNet whose every width is multiplied, that of the stem too.

    Source: vicreg@4e12602, resnet.py, `widen`.
    """

    def __init__(self, *args: Any, widen: int = 2, in_chans: int = 3, **kwargs: Any) -> None:
        channels = tuple(widen * width for width in (64, 128, 256, 512))
        super().__init__(*args, in_chans=in_chans, channels=channels, **kwargs)
        stem = channels[0]
        self.conv1 = nn.Conv2d(in_chans, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        first: Any = self.layer1[0]  # pyright: ignore[reportIndexIssue]
        first.conv1 = nn.Conv2d(stem, first.conv1.out_channels, 1, bias=False)
        first.downsample = downsample_conv(stem, 4 * stem, kernel_size=1)
        self.feature_info[0]["num_chs"] = stem
        self.init_weights()


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with the stem for small images; 11.2 million parameters without a classifier."""
    args = {"block": BasicBlock, "layers": (2, 2, 2, 2)} | kwargs
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **args)


@register_model
def resnet50x2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 of twice the width, the paper's R50 (x2); not wide_resnet50_2."""
    args = {"block": Bottleneck, "layers": (3, 4, 6, 3)} | kwargs
    return build_model_with_cfg(WideResNet, "resnet50x2", pretrained, **args)


@register_model
def resnet200x2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-200 of twice the width, the paper's R200 (x2)."""
    args = {"block": Bottleneck, "layers": (3, 24, 36, 3)} | kwargs
    return build_model_with_cfg(WideResNet, "resnet200x2", pretrained, **args)
