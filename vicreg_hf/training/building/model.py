"""From settings to a model with weights from the seed, checked with one sample of what it takes.

Shapes: C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.data.columns.base import Column
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.vectors import VectorColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.memory import SMALL_IMAGE
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.timm_models import check_architecture, create_backbone, encoder_pretrained_cfg
from vicreg_hf.models.tokenizers import check_tokenizer
from vicreg_hf.models.waveform_encoder import WaveformEncoder
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.randomness import Stream, derive_seed
from vicreg_hf.settings.pretraining import PretrainingArguments


def build_model(
    args: PretrainingArguments,
    pairs: PairedSplit | None = None,
    *,
    sound: SpectrogramSettings | None = None,
) -> VICRegModel:
    """The model that a run trains.

    Args:
        args: settled.
        pairs: the samples of a second branch that takes something else than the images.
        sound: how sounds become the first branch's images, if they do.

    Raises:
        ValueError: architectures or arguments that cannot be, or that do not take what they get.
    """
    torch.manual_seed(derive_seed(args.seed, epoch=0, index=0, stream=Stream.MODEL))
    assert args.image_size is not None
    backbone, model_args, cfg = timm_branch(
        args.architecture, _dict(args.model_args), image_size=args.image_size,
        pretrained=args.pretrained, whole=sound is not None,
    )  # fmt: skip
    column = None if pairs is None else pairs.column
    prime, backbone_prime = create_prime(args, column, sound=sound is not None)
    config = VICRegConfig(
        architecture=args.architecture, model_args=model_args, pretrained_cfg=cfg,
        expander_dims=args.expander_widths, sim_coeff=args.sim_coeff, std_coeff=args.std_coeff,
        cov_coeff=args.cov_coeff, variance_reduction=args.variance_reduction, prime=prime,
        spectrogram=None if sound is None else sound.to_dict(),
    )  # fmt: skip
    model = VICRegModel(config, backbone=backbone, backbone_prime=backbone_prime)
    check_takes(model, args, pairs)
    return model


def create_prime(
    args: PretrainingArguments, column: Column | None, *, sound: bool = False
) -> tuple[dict[str, Any] | None, nn.Module | None]:
    """The second branch as `VICRegConfig` describes it, and its encoder; None where there is none.

    Args:
        column: of what it takes; None where that is the first branch's images.
        sound: whether those images are spectrograms.

    Raises:
        ValueError: an architecture or arguments that cannot be.
    """
    modality, encoder, own = args.prime_modality, None, _dict(args.prime_model_args)
    if modality is None:
        return None, None
    name = args.prime_architecture or args.architecture
    found: dict[str, Any] = {"modality": modality, "expander_dims": args.prime_expander_widths}
    if isinstance(column, TextColumn):
        encoder = TextEncoder.create(name, own, pretrained=args.prime_pretrained)
        check_tokenizer(encoder, column.tokenizer, column.max_length)
        found["preparation"] = {"max_length": column.max_length}
    elif isinstance(column, WaveformColumn):
        encoder = WaveformEncoder.create(name, own, pretrained=args.prime_pretrained)
        found["preparation"] = {
            "sampling_rate": column.sampling_rate, "seconds": args.audio_seconds,
        }  # fmt: skip
    elif isinstance(column, VectorColumn):
        found["num_features"] = column.width
    else:
        if args.prime_architecture is None and own is None:
            own = _dict(args.model_args)
        if isinstance(column, SpectrogramColumn):
            own = (own or {}) | {"in_chans": 1}
            found["preparation"] = column.settings.to_dict()
        elif column is None:  # the same images
            own = {"in_chans": args.in_chans} | (own or {}) if args.in_chans != 3 else own
        assert args.prime_image_size is not None
        check_architecture(name, "prime_architecture")
        encoder, own, found["pretrained_cfg"] = timm_branch(
            name,
            own,
            image_size=args.prime_image_size,
            pretrained=args.prime_pretrained,
            whole=isinstance(column, SpectrogramColumn) or (column is None and sound),
        )
        found |= {"architecture": name.partition(".")[0], "model_args": own}
    if isinstance(encoder, (TextEncoder, WaveformEncoder)):
        settings: Any = encoder.model.config
        fields = settings.to_dict()
        fields.pop("_name_or_path", None)  # of this machine
        found |= {"architecture": settings.model_type, "encoder_config": fields}
    return found, encoder


def timm_branch(
    architecture: str,
    model_args: Mapping[str, Any] | None,
    *,
    image_size: int,
    pretrained: bool = False,
    whole: bool = False,
) -> tuple[nn.Module, dict[str, Any] | None, dict[str, Any]]:
    """A timm backbone that takes views of image_size.

    Args:
        whole: images are evaluated without cutting their edges off, as small ones always are.

    Returns:
        It, the model_args it was built with, and its pretrained_cfg.
    """
    args = dict(model_args or {})
    name = architecture if pretrained else architecture.partition(".")[0]
    backbone: Any = create_backbone(name, args, pretrained=pretrained)
    cfg = encoder_pretrained_cfg(backbone.pretrained_cfg, args)
    if cfg.get("fixed_input_size") and cfg["input_size"][-1] != image_size:
        args["img_size"] = image_size
        backbone = create_backbone(name, args, pretrained=pretrained)
    cfg = encoder_pretrained_cfg(cfg, args, image_size)
    # Small images are seen whole; larger ones are evaluated on the authors' central crop.
    crop_pct = 1.0 if whole or image_size <= SMALL_IMAGE else 0.875
    return backbone, args or None, cfg | {"crop_pct": crop_pct, "interpolation": "bicubic"}


@torch.inference_mode()
def check_takes(model: VICRegModel, args: PretrainingArguments, pairs: PairedSplit | None) -> None:
    """Encode one of each kind of input, so that what cannot work fails before training.

    Raises:
        ValueError: says which encoder does not take what.
    """
    assert args.image_size is not None
    model.eval()
    config = model.config
    sides = [args.image_size, *([args.local_image_size] if args.num_local_views else [])]
    for side in sides:
        shape = (1, args.in_chans, side, side)
        hint = " Local views need model_args with dynamic_img_size, where the model has it."
        with _refused(
            config.architecture, config.model_args, shape, hint if side != sides[0] else ""
        ):
            model(torch.zeros(shape))
    if config.prime is not None:
        name, own = config.prime["architecture"], config.prime["model_args"]
        if config.prime["pretrained_cfg"] is not None:
            shape = (1, *config.prime["pretrained_cfg"]["input_size"])
            with _refused(name, own, shape):
                model(pixel_values_prime=torch.zeros(shape))
        elif pairs is not None:
            column: Any = pairs.column
            _, items = zip(*pairs.read_or_replace([0, 0])[0], strict=True)
            with _refused(name, own, None):
                model(pixel_values_prime=column.batch(items, np.zeros(2, np.int64), 0, args.seed))
    model.train()


@contextmanager
def _refused(
    name: str | None, model_args: Any, shape: tuple[int, ...] | None, hint: str = ""
) -> Iterator[None]:
    """One sentence of whatever an encoder raises of an input."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        what = "what is in its column"
        if shape is not None:
            what = f"images of {' x '.join(map(str, shape[1:]))}"
        raise ValueError(
            f"the backbone must take {what}, but {name} with model_args={model_args} does not: "
            f"{one_line(error)}{hint}"
        ) from error


def _dict(given: Any) -> dict[str, Any] | None:
    assert not isinstance(given, str)  # the arguments have read it
    return given
