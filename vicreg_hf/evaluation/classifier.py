"""An encoder and a linear classifier of its features, as one module.

Shapes: B images, C channels, S side in pixels, F features, K classes.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from vicreg_hf.features.encoders import Encoder
from vicreg_hf.hub.export import same_features
from vicreg_hf.hub.layout import CONFIG_FILE, ENCODER_FILE
from vicreg_hf.models.resnets import is_ours, published_name
from vicreg_hf.models.timm_models import encoder_pretrained_cfg, is_timm
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import writing
from vicreg_hf.runtime.randomness import Stream, derive_seed

HEAD_STD = 0.01
"""Standard deviation of the classifier's first weights; its first biases are zero."""


class Classifier(nn.Module):
    """A linear classifier of an encoder's features, in float32 whatever the autocast.

    Args:
        encoder: gives (B, F) for (B, C, S, S).
        head: gives (B, K).
        frozen: keep the encoder in eval mode, and give it no gradients.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, *, frozen: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.frozen = encoder.requires_grad_(not frozen), head, frozen
        self.train()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.encoder(x)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))


def create_head(num_features: int, num_classes: int, *, seed: int) -> nn.Linear:
    """A linear classifier with the authors' first weights, a function of its size and the seed."""
    # torch's own initialisation would advance the caller's generator
    head = nn.Linear(num_features, num_classes, device="meta").to_empty(device="cpu")
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, epoch=0, index=0, stream=Stream.MODEL))
    nn.init.normal_(head.weight, std=HEAD_STD, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def freeze_unused(model: Classifier, images: Tensor) -> None:
    """Encode some images, and freeze the parameters that their features do not depend on.

    DistributedDataParallel awaits a gradient of every parameter that is not frozen.

    Raises:
        ValueError: features of another shape than (B, F).
    """
    with torch.set_grad_enabled(not model.frozen):
        features = model.encoder.eval()(images)
    model.train()
    expected = (len(images), model.head.in_features)
    if not isinstance(features, Tensor) or features.shape != expected:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the encoder must give features of shape {expected} for images of shape "
            f"{tuple(images.shape)}, got {got}."
        )
    if features.requires_grad:
        parameters = list(model.encoder.parameters())
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


# --- keeping a classifier
MARK = "vicreg_classifier"
"""The field of config.json by which a directory is known to hold a classifier of ours."""


def check_savable(encoder: Encoder, names: Sequence[str], directory: str | Path) -> None:
    """Refuse a classifier that could not be kept, before it is trained.

    One that knows nothing yet is written beside the place and read by the stock loaders.

    Args:
        names: (K,) names of the classes.
        directory: where it is to be kept; made if absent.

    Raises:
        ValueError: the directory is in use by something else or cannot be written, or stock loaders
            do not give the encoder's features such a classifier.
    """
    directory = Path(directory)
    if not is_timm(encoder.module):
        raise ValueError(
            "save_classifier needs an encoder of timm, whose layout it is, and this one is "
            "transformers' own; leave save_classifier out."
        )
    if directory.is_dir() and any(directory.iterdir()) and not _is_ours(directory):
        raise ValueError(
            f"save_classifier must be a new or empty directory, or hold an earlier classifier, and "
            f"{directory} holds other files; choose another."
        )
    with writing(directory, "save_classifier"):
        directory.mkdir(parents=True, exist_ok=True)
    head = create_head(encoder.num_features, len(names), seed=0)
    module = copy.deepcopy(encoder.module).cpu()
    with tempfile.TemporaryDirectory() as place:
        _write(Classifier(module, head, frozen=True), encoder, names, Path(place))


def save_classifier(
    model: Classifier, encoder: Encoder, names: Sequence[str], directory: Path
) -> Path:
    """Keep a classifier where stock transformers and timm load it, once they give its logits.

    Args:
        model: trained from the encoder.
        names: (K,) names of the classes.
        directory: an earlier classifier in it is replaced.

    Returns:
        The directory.

    Raises:
        ValueError: as `check_savable`; the directory is as it was.
    """
    with writing(directory, "save_classifier"):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".save-") as aside:
            _write(copy.deepcopy(model).cpu(), encoder, names, Path(aside))
            for file in Path(aside).iterdir():
                file.replace(directory / file.name)
    for abandoned in directory.glob(".save-*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    return directory


def _is_ours(directory: Path) -> bool:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and MARK in config


@torch.no_grad()
def _write(model: Classifier, encoder: Encoder, names: Sequence[str], directory: Path) -> None:
    """Write a classifier on the CPU, and compare it with what the stock loaders make of it."""
    model = model.float().eval()
    module: Any = model.encoder
    given = {k: v for k, v in (encoder.identity["model_args"] or {}).items() if k != "num_classes"}
    architecture = str(encoder.identity["architecture"])
    whole: Any = timm.create_model(architecture, pretrained=False, num_classes=len(names), **given)
    state = dict(model.encoder.state_dict())
    linear = whole.get_classifier()
    place = [name for name, part in whole.named_modules() if part is linear]
    if not isinstance(linear, nn.Linear) or linear.weight.shape != model.head.weight.shape:
        raise ValueError(
            f"save_classifier needs an encoder whose classifier is one linear layer of its "
            f"features, and that of timm's {architecture} is not."
        )
    state |= {f"{place[0]}.{k}": v for k, v in model.head.state_dict().items()}
    cfg = encoder_pretrained_cfg(module.pretrained_cfg, given, encoder.image_size)
    view = {k: encoder.data_config[k] for k in ("input_size", "mean", "std", "crop_pct")}
    config = {
        "architecture": published_name(architecture.partition(".")[0])
        if is_ours(architecture) else architecture.partition(".")[0],
        "num_classes": len(names), "num_features": model.head.in_features,
        "pretrained_cfg": cfg | view | {"num_classes": len(names), "classifier": place[0]},
        "model_args": given, "label_names": list(names), "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification"],
        MARK: {"frozen": model.frozen},
    }  # fmt: skip
    text = json.dumps(config, indent=2, default=list) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    state = {k: v.clone().contiguous() for k, v in state.items()}
    save_file(state, directory / ENCODER_FILE, metadata={"format": "pt"})
    shutil.copymode(directory / CONFIG_FILE, directory / ENCODER_FILE)
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, *encoder.data_config["input_size"], generator=noise)
    _compare(directory, pixels, model(pixels), names)


def _compare(directory: Path, pixels: Tensor, expected: Tensor, names: Sequence[str]) -> None:
    """Load a classifier as users do, and compare logits (B, K) and names.

    Raises:
        ValueError: a loader fails, or gives others.
    """
    fault = None
    try:
        stock: Any = AutoModelForImageClassification.from_pretrained(directory)
        if [stock.config.id2label[k] for k in range(len(names))] != list(names):
            fault = "AutoModelForImageClassification gives other class names"
        bare: Any = timm.create_model(f"local-dir:{directory}", pretrained=True)
        found = {"AutoModelForImageClassification": stock.eval()(pixels).logits,
                 "timm": bare.eval()(pixels)}  # fmt: skip
        for loader, logits in found.items():
            if not same_features(logits, expected):
                fault = f"{loader} gives other logits"
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        fault = one_line(error)[:300]
    if fault is not None:
        raise ValueError(
            f"save_classifier needs a classifier that stock loaders read as it is, and {fault}; "
            "leave save_classifier out, or choose another encoder."
        )
