"""Opening encoders, our own and other people's: images in, pooled features out.

Shapes: B images, C channels, S side in pixels, F features, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, TimmWrapperConfig

from vicreg_hf.configuration_vicreg import NESTED_KEY
from vicreg_hf.data.columns.spectrograms import SpectrogramSettings
from vicreg_hf.hub.api import check_repo_id, check_revision
from vicreg_hf.hub.source import find_encoder
from vicreg_hf.models.timm_models import create_backbone
from vicreg_hf.publishing.loading import load_model
from vicreg_hf.runtime.checks import fault_at_hub, one_line, read_range
from vicreg_hf.runtime.console import optional

PIL_CHANNELS = (1, 3)
"""Images of these numbers of channels are resized by PIL, as stock pipelines do."""


@dataclass(frozen=True)
class Encoder:
    """A network that gives pooled features, and how it wants its images."""

    module: nn.Module
    """Gives (B, F) for (B, C, S, S), in eval mode."""
    num_features: int
    """F."""
    prepare: Callable[[Tensor], Tensor]
    """Its evaluation view: an image (C, H, W) uint8 as (C, S, S), uint8 or normalised float32."""
    data_config: Mapping[str, Any]
    """timm's words for that: input_size, mean, std, crop_pct."""
    identity: Mapping[str, Any] = field(repr=False)
    """All else that its features depend on."""
    sound: SpectrogramSettings | None = None
    """How sounds become its images, if it was trained on sounds."""
    value_range: tuple[float, float] | None = None
    """The values that become black and white, if it was trained on images of more than 8 bits."""
    map_size: tuple[int, int] | None = None
    """h and w of a feature map that takes the place of pooled features, flattened to F = h w width
    numbers; None where features are pooled."""

    @property
    def in_chans(self) -> int:
        return self.data_config["input_size"][0]

    @property
    def image_size(self) -> int:
        """S."""
        return self.data_config["input_size"][-1]

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self.data_config["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.data_config["std"])

    def fingerprint(self) -> str:
        """A digest of weights, architecture and preprocessing: alike where features are."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode())
        for name, value in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def open_encoder(name: str, revision: str | None = None) -> Encoder:
    """Open an encoder of timm or of transformers, on the Hub or in a directory.

    Args:
        name: Hub id, output_dir of a run, or directory of an encoder or a checkpoint.
        revision: branch or commit, on the Hub.

    Raises:
        ValueError: no such model, or not one of images.
    """
    local = Path(name).exists()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(
            f"model must be a directory that is there, or org/name on the Hub, got {name!r}."
        )
    if not local:
        check_repo_id(name, "model")
        if revision is not None:
            check_revision(revision)
    fault = None if local else fault_at_hub(name, "model")
    before = constants.HF_HUB_OFFLINE
    try:
        # it may still be in the cache; loaders would ask five times more
        constants.HF_HUB_OFFLINE = before or fault is not None
        source = encoder_directory(name) if local else name
        config = AutoConfig.from_pretrained(source, revision=revision)
        if config.model_type == "vicreg":
            model, _ = load_model(Path(source))
            encoder = timm_encoder(
                model.encoder, config.architecture, config.model_args, config.pretrained_cfg
            )
            own = {"spectrogram": config.spectrogram, "value_range": config.value_range}
        elif isinstance(config, TimmWrapperConfig):
            at = "" if revision is None else f"@{revision}"
            address = f"local-dir:{source}" if local else f"hf-hub:{source}{at}"
            model = timm.create_model(address, pretrained=True, num_classes=0)
            encoder = timm_encoder(model, config.architecture, getattr(config, "model_args", None))
            own = getattr(config, NESTED_KEY, None) or {}
        else:
            return _transformers_encoder(source, revision)
        sound = own.get("spectrogram")
        return replace(
            encoder, sound=None if sound is None else SpectrogramSettings(**sound),
            value_range=read_range("value_range", own.get("value_range")),
        )  # fmt: skip
    except Exception as error:  # loaders raise whatever their files make them
        raise ValueError(
            "model must be an encoder of images that timm or AutoModel loads, on the Hub or in a "
            f"directory, got {name!r}{'' if local else ', which is no directory here'}: "
            f"{fault or one_line(error)[:300]}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def encoder_directory(name: str) -> str:
    """The directory of the weights of an encoder or a run on this machine."""
    try:
        return str(find_encoder(name))
    except ValueError:
        if (Path(name) / "config.json").is_file():  # weights in several files, say
            return name
        raise


def timm_encoder(
    module: Any,
    architecture: str,
    model_args: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> Encoder:
    """A timm model without a classifier.

    Args:
        module: of timm, with num_classes=0.
        architecture: its name; likewise model_args, what else it was built with.
        pretrained_cfg: instead of its own.
    """
    if pretrained_cfg is not None:
        module.pretrained_cfg = dict(pretrained_cfg)
    data_config: dict[str, Any] = resolve_model_data_config(module)
    identity = {"architecture": architecture, "model_args": model_args, "data": data_config}
    width = int(module.head_hidden_size)
    transform = create_transform(**data_config, is_training=False, use_prefetcher=True)
    kept = tuple(data_config["input_size"][1:]) if data_config["crop_pct"] == 1 else None
    view = partial(_timm_view, transform=transform, kept=kept)
    return Encoder(module.eval(), width, view, data_config, identity)


def untrained_like(encoder: Encoder, *, seed: int) -> Encoder | None:
    """The same network with random weights, or None where it cannot be made anew."""
    identity = encoder.identity
    with torch.random.fork_rng(), optional("the encoder is not compared with an untrained one"):
        torch.manual_seed(seed)
        if isinstance(encoder.module, _Pooled):
            model: Any = encoder.module.model
            module: nn.Module = _Pooled(type(model)(model.config), trained_pooler=True)
        else:
            module = create_backbone(identity["architecture"], identity["model_args"] or {})
        return replace(encoder, module=module.eval(), identity={"untrained": seed, "of": identity})
    return None


def _timm_view(image: Tensor, *, transform: Any, kept: tuple[int, int] | None) -> Tensor:
    """The evaluation view of timm, as TimmWrapperImageProcessor makes it, before normalisation.

    Args:
        kept: size of images that are left as they are.
    """
    if image.shape[-2:] == kept:
        return image
    if len(image) not in PIL_CHANNELS:
        return transform(image)
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return transform(Image.fromarray(pixels.contiguous().numpy()))


def _transformers_encoder(source: str, revision: str | None) -> Encoder:
    processor: Any = AutoImageProcessor.from_pretrained(source, revision=revision)
    loaded: Any = AutoModel.from_pretrained(
        source, revision=revision, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    pooled = not any("pooler" in name for name in found["missing_keys"])
    module = _Pooled(model, trained_pooler=pooled).eval()
    view = partial(_processed, processor)
    sample = view(torch.zeros(3, 64, 64, dtype=torch.uint8))
    with torch.inference_mode():
        width = module(sample[None]).shape[1]
    sizes = [dict(getattr(processor, kind, None) or {}) for kind in ("size", "crop_size")]
    data_config = {
        "input_size": tuple(sample.shape),
        "mean": tuple(getattr(processor, "image_mean", None) or (0.0, 0.0, 0.0)),
        "std": tuple(getattr(processor, "image_std", None) or (1.0, 1.0, 1.0)),
        "crop_pct": _crop_pct(*sizes, side=sample.shape[-1]),
    }
    described = model.config.to_dict()
    described.pop("_name_or_path", None)  # where it is makes it no other encoder
    identity = {
        "config": described, "processor": processor.to_dict(), "pooled": pooled,
        "transformers": transformers.__version__,
    }  # fmt: skip
    return Encoder(module, width, view, data_config, identity)


class _Pooled(nn.Module):
    """A transformers model that gives (B, F) for (B, C, S, S).

    It gives its pooler's output; a model that has no pooler, or whose file holds no weights for it,
    gives the first token of (B, T, F), which is the class token, or the mean over the positions of
    (B, F, H, W).
    """

    def __init__(self, model: nn.Module, *, trained_pooler: bool) -> None:
        super().__init__()
        self.model, self.trained_pooler = model, trained_pooler
        if not trained_pooler:  # its weights are random, and no part of the encoder
            for name, parameter in model.named_parameters():
                if "pooler" in name:
                    nn.init.zeros_(parameter)

    def forward(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        if hasattr(model, "get_image_features"):  # a model of images and texts, such as CLIP
            found = model.get_image_features(pixel_values=pixels)
            return found if isinstance(found, Tensor) else found.pooler_output
        output = model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.trained_pooler:
            return pooled.flatten(1)
        last = output.last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.mean((2, 3))


def _processed(processor: Any, image: Tensor) -> Tensor:
    """The view that a transformers image processor makes of an image, normalised."""
    pixels = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return processor(images=picture, return_tensors="pt")["pixel_values"][0]


def _crop_pct(size: dict[str, int], crop: dict[str, int], *, side: int) -> float:
    """The part of the shorter side that a processor's centre crop leaves."""
    resized = size.get("shortest_edge")
    return side / resized if crop and resized and resized > side else 1.0
