"""From settings to a model with weights from the seed, tried with one sample of each input.

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
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn, SpectrogramSettings
from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.vectors import VectorColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.memory import SMALL_IMAGE
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.feature_map import NoFeatureMap
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.timm_models import check_architecture, create_backbone, encoder_pretrained_cfg
from vicreg_hf.models.tokenizers import check_tokenizer
from vicreg_hf.models.waveform_encoder import WaveformEncoder
from vicreg_hf.runtime.checks import one_line, read_range
from vicreg_hf.runtime.randomness import Stream, derive_seed
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.own_parts import COEFFICIENTS, LOCAL_SETTINGS
from vicreg_hf.training.building.starts import INIT, PRIME, Start, Starts


def build_model(
    args: PretrainingArguments,
    pairs: PairedSplit | None = None,
    *,
    sound: SpectrogramSettings | None = None,
    starts: Starts | None = None,
) -> VICRegModel:
    """The model that a run trains.

    Args:
        args: the settings as `open_training_data` completes them.
        pairs: the pairs, where the second branch takes another column.
        sound: how sounds become the first branch's images, if they do.
        starts: the encoders that the branches start from.

    Raises:
        ValueError: architectures or arguments that cannot be, or that do not take their inputs.
    """
    torch.manual_seed(derive_seed(args.seed, epoch=0, index=0, stream=Stream.MODEL))
    own: Any = args.model_args
    starts = starts or {}
    architecture = str(args.architecture)
    backbone, own, cfg = _create_timm_encoder(
        architecture, own, args.image_size, pretrained=args.pretrained, whole=sound is not None,
        start=starts.get(INIT),
    )  # fmt: skip
    column = None if pairs is None else pairs.column
    prime, backbone_prime = _create_second_encoder(
        args, column, sound=sound is not None, start=starts.get(PRIME)
    )
    config = VICRegConfig(
        architecture=architecture, model_args=own, pretrained_cfg=cfg,
        expander_dims=args.expander_widths, sim_coeff=args.sim_coeff, std_coeff=args.std_coeff,
        cov_coeff=args.cov_coeff, variance_reduction=args.variance_reduction, prime=prime,
        local_weight=args.local_weight, local_matches=args.local_matches,
        local_view_matches=args.local_view_matches, local_expander_dims=args.local_expander_widths,
        spectrogram=None if sound is None else sound.to_dict(),
        value_range=read_range("value_range", args.value_range),
    )  # fmt: skip
    model = VICRegModel(config, backbone=backbone, backbone_prime=backbone_prime)
    _try_inputs(model, args, pairs)
    return model


def enable_gradient_checkpointing(model: VICRegModel) -> None:
    """Let the encoders keep few activations, and compute the others again in the backward pass.

    Raises:
        ValueError: an encoder of which timm, or transformers, cannot.
    """
    try:
        model.activation_checkpointing_enable()
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"gradient_checkpointing must be false with {model.config.architecture}, got true: "
            f"{one_line(error) or 'timm cannot'}. A lower --micro_batch_size takes less memory too."
        ) from error


def adopt_model(
    model: VICRegModel, args: PretrainingArguments, *, sound: SpectrogramSettings | None = None
) -> VICRegModel:
    """The model that a run was given, set to the run's images; it is trained itself, not a copy.

    Args:
        args: as for `build_model`; likewise sound.

    Raises:
        ValueError: it does not take the run's images.
    """
    config, size = model.config, args.image_size
    assert size is not None
    model.set_image_size(size)
    assert config.pretrained_cfg is not None
    config.pretrained_cfg |= evaluation_crop(size, whole=sound is not None)
    config.spectrogram = None if sound is None else sound.to_dict()
    config.value_range = read_range("value_range", args.value_range)
    for name in COEFFICIENTS + LOCAL_SETTINGS:
        setattr(config, name, getattr(args, name))
    for parameter in model.parameters():
        parameter.grad = None
    _try_inputs(model, args, None)
    return model


def evaluation_crop(image_size: int, *, whole: bool) -> dict[str, Any]:
    """How images are evaluated: small ones seen whole, larger ones on the authors' central crop.

    Args:
        whole: also larger ones whole.
    """
    crop_pct = 1.0 if whole or image_size <= SMALL_IMAGE else 0.875
    return {"crop_pct": crop_pct, "interpolation": "bicubic"}


def _create_second_encoder(
    args: PretrainingArguments, column: Column | None, *, sound: bool, start: Start | None
) -> tuple[dict[str, Any] | None, nn.Module | None]:
    """The second branch as `VICRegConfig` describes it, and its encoder; None where there is none.

    Args:
        column: the column that it takes; None for the first branch's images.
        sound: whether those images are spectrograms.
        start: the encoder that it starts from.

    Raises:
        ValueError: an architecture or arguments that cannot be.
    """
    if args.prime_modality is None:
        return None, None
    name, pretrained = str(args.prime_architecture or args.architecture), args.prime_pretrained
    own: Any = args.prime_model_args
    prime = {"modality": args.prime_modality, "expander_dims": args.prime_expander_widths}
    if isinstance(column, VectorColumn):
        return prime | {"num_features": column.width}, None
    if isinstance(column, (TextColumn, WaveformColumn)):
        if isinstance(column, TextColumn):
            encoder: Any = TextEncoder.create(name, own, pretrained=pretrained)
            check_tokenizer(encoder, column.tokenizer, column.max_length)
            preparation: Any = {"max_length": column.max_length}
        else:
            encoder = WaveformEncoder.create(name, own, pretrained=pretrained)
            preparation = {"sampling_rate": args.sampling_rate, "seconds": args.audio_seconds}
        encoder_config = encoder.model.config.to_dict()
        encoder_config.pop("_name_or_path", None)  # a path of this machine
        return prime | {
            "architecture": encoder.model.config.model_type, "encoder_config": encoder_config,
            "preparation": preparation,
        }, encoder  # fmt: skip
    if args.prime_architecture is None and own is None:
        own = args.model_args
    if isinstance(column, ImageColumn) and column.value_range is not None:
        prime["preparation"] = {"value_range": column.value_range}
    spectrograms = column.settings if isinstance(column, SpectrogramColumn) else None
    if spectrograms is not None:
        own = (own or {}) | {"in_chans": 1}
        prime["preparation"] = spectrograms.to_dict()
    elif column is None and args.in_chans != 3:  # the images of the first branch
        own = {"in_chans": args.in_chans} | (own or {})
    check_architecture(name, "prime_architecture")
    encoder, own, cfg = _create_timm_encoder(
        name, own, args.prime_image_size, pretrained=pretrained, start=start,
        whole=spectrograms is not None or (column is None and sound),
    )  # fmt: skip
    base = name.partition(".")[0]
    return prime | {"architecture": base, "model_args": own, "pretrained_cfg": cfg}, encoder


def _create_timm_encoder(
    architecture: str,
    model_args: Mapping[str, Any] | None,
    image_size: int | None,
    *,
    pretrained: bool,
    whole: bool,
    start: Start | None = None,
) -> tuple[nn.Module, dict[str, Any] | None, dict[str, Any]]:
    """A timm backbone that takes views of image_size.

    Args:
        whole: images are evaluated without cutting their edges off, as small ones always are.
        start: the encoder that it starts from.

    Returns:
        It, the model_args it was built with, and its pretrained_cfg.
    """
    assert image_size is not None
    args = dict(model_args or {})
    name = architecture if pretrained else architecture.partition(".")[0]
    backbone: Any = create_backbone(name, args, pretrained=pretrained)
    cfg = encoder_pretrained_cfg(backbone.pretrained_cfg, args)
    if cfg.get("fixed_input_size") and cfg["input_size"][-1] != image_size:
        args["img_size"] = image_size
        backbone = create_backbone(name, args, pretrained=pretrained)
    if start is not None:
        theirs = {**backbone.pretrained_cfg, **start.pretrained_cfg}
        resizable = cfg.get("fixed_input_size") or "img_size" in start.model_args
        if resizable and {cfg["input_size"][-1], theirs["input_size"][-1]} != {image_size}:
            args["img_size"] = image_size
        backbone, cfg = start.create_backbone(args), theirs
    cfg = encoder_pretrained_cfg(cfg, args, image_size)
    return backbone, args or None, cfg | evaluation_crop(image_size, whole=whole)


@torch.inference_mode()
def _try_inputs(model: VICRegModel, args: PretrainingArguments, pairs: PairedSplit | None) -> None:
    """Encode one of each kind of input, so that an encoder that refuses it fails before training.

    Raises:
        ValueError: says which encoder does not take which input, or has no feature map where the
            local loss needs one.
    """
    model.eval()
    first, second = model.config, model.config.prime
    dropped = (first.model_args or {}).get("patch_drop_rate")
    if dropped and model.local_expander is not None:
        raise ValueError(
            "patch_drop_rate of model_args must be 0 where local_weight is above 0, as a feature "
            f"map needs every patch, got {dropped}."
        )
    for side in [args.image_size, *([args.local_image_size] if args.num_local_views else [])]:
        shape: Any = (args.in_chans, side, side)
        local = " Local views need model_args with dynamic_img_size, where the model has it."
        with _refusals(first.architecture, first.model_args, shape,
                       "" if side == args.image_size else local):  # fmt: skip
            found = model(torch.zeros(1, *shape)).feature_map
        if found is not None and side == args.image_size and found[0, 0].numel() == 1:
            raise ValueError(
                f"the feature map of {first.architecture} must have several cells to match where "
                f"local_weight is above 0, got one for images of {side} x {side}; take a larger "
                "image_size, or a backbone that reduces images less."
            )
    if second is not None:
        shape = None if second["pretrained_cfg"] is None else second["pretrained_cfg"]["input_size"]
        with _refusals(second["architecture"], second["model_args"], shape):
            if shape is not None:
                model(pixel_values_prime=torch.zeros(1, *shape))
            elif pairs is not None:
                column: Any = pairs.column
                _, items = zip(*pairs.read_or_replace([0, 0])[0], strict=True)
                model(pixel_values_prime=column.batch(items, np.zeros(2, np.int64), 0, args.seed))
    model.train()


@contextmanager
def _refusals(
    name: str | None, model_args: Any, shape: tuple[int, ...] | None, hint: str = ""
) -> Iterator[None]:
    """Say in one sentence that an encoder refuses an input, whatever it raises."""
    try:
        yield
    except NoFeatureMap as error:
        raise ValueError(f"local_weight must be 0, or {error}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        inputs = "the samples of its column"
        if shape is not None:
            inputs = f"images of {' x '.join(map(str, shape))}"
        raise ValueError(
            f"the backbone must take {inputs}, but {name} with model_args={model_args} does not: "
            f"{one_line(error)}{hint}"
        ) from error
