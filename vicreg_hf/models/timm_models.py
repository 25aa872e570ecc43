"""Backbones of timm: their names, creation, pooling and preprocessing.

Shapes: B samples per process, C channels, S side in pixels, F representation.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, filter_pretrained_cfg
from torch import Tensor, nn

from vicreg_hf.runtime.checks import one_line


def is_timm(encoder: nn.Module) -> bool:
    """Say whether an encoder is a model of timm, and so published in timm's layout."""
    return hasattr(encoder, "forward_head")


def pooled(backbone: Any, pixel_values: Any) -> tuple[Tensor, Tensor]:
    """Compute a timm backbone's feature map or tokens, and the representations (B, F).

    Raises:
        ValueError: a backbone that does not pool.
    """
    features = backbone.forward_features(pixel_values)
    y = backbone.forward_head(features)
    if y.ndim != 2:
        raise ValueError(
            "the backbone must pool to shape (batch, features), got "
            f"{tuple(y.shape)}; remove global_pool from model_args."
        )
    return features, y


def width_of(backbone: Any) -> int:
    """Return F of a timm backbone, after pooling and any head layer, unlike its num_features."""
    return int(backbone.head_hidden_size)


def check_architecture(name: str, setting: str = "architecture") -> str:
    """Return a timm architecture's name without its tag, or say what is expected.

    Args:
        setting: the name of the setting, for the message.

    Raises:
        ValueError: timm has no such model.
    """
    base = name.partition(".")[0]
    if timm.is_model(base):
        return base
    bare = re.split(r"[/:\\]", name.rstrip("/"))[-1]
    if bare != name or Path(name).is_dir():
        known = bare if timm.is_model(bare.partition(".")[0]) else "resnet18"
        pretrained, init_from = (
            setting.replace("architecture", flag) for flag in ("pretrained", "init_from")
        )
        raise ValueError(
            f"{setting} must be the bare name of a timm model, such as {known}, got {name!r}; "
            f"--{init_from} {name} starts from an encoder in a directory or on the Hub, and "
            f"--{pretrained} true from timm's own weights."
        )
    near = get_close_matches(base, timm.list_models(), n=4, cutoff=0.5)
    hint = f"close to it are {', '.join(near)}" if near else "timm.list_models() lists them"
    raise ValueError(f"{setting} must be a timm model, got {name!r}; {hint}.")


def create_backbone(
    name: str, model_args: Mapping[str, Any], *, pretrained: bool = False
) -> nn.Module:
    """Create a timm model without a classifier.

    Raises:
        ValueError: arguments that timm refuses, or weights that cannot be loaded.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **{**model_args, "num_classes": 0})
    except TypeError as error:
        raise ValueError(
            f"model_args must be arguments of timm's {name}, got {dict(model_args)}: {error}."
        ) from error
    except (RuntimeError, AssertionError, OSError) as error:
        if pretrained and isinstance(error, OSError):
            raise ValueError(
                f"pretrained weights of {name} must be on the Hub, and that in reach, or in its "
                f"cache, or start from random ones; {one_line(error)}"
            ) from error
        weights = "with pretrained weights " if pretrained else ""
        raise ValueError(
            f"timm must be able to build {name} {weights}from model_args, got {dict(model_args)}: "
            f"{one_line(error)}"
        ) from error


def adapt_backbone(
    name: str,
    model_args: Mapping[str, Any],
    *,
    state: Mapping[str, Tensor],
    pretrained_cfg: Mapping[str, Any],
    source_args: Mapping[str, Any],
) -> nn.Module:
    """Create a timm model without a classifier from weights that may be of another input.

    timm adapts the first convolution to other channels and position embeddings to another size;
    every other weight must be there and have its place.

    Args:
        name: timm model.
        model_args: keyword arguments for `timm.create_model`.
        state: the weights by timm's names, without a classifier's.
        pretrained_cfg: timm's record of these weights.
        source_args: keyword arguments that their model was built with.

    Raises:
        ValueError: arguments that timm refuses, or weights that do not fit; some are named.
    """
    bare: Any = create_backbone(name, model_args)
    cfg = {**bare.pretrained_cfg, **{k: v for k, v in pretrained_cfg.items() if v is not None}}
    channels = source_args.get("in_chans") or cfg["input_size"][0]
    cfg = {key: value for key, value in cfg.items() if key in _CFG_FIELDS and key not in _PLACES}
    cfg |= {
        "num_classes": 0, "label_offset": 0, "custom_load": False,
        "input_size": (channels, *cfg["input_size"][1:]), "state_dict": dict(state),
    }  # fmt: skip
    given: dict[str, Any] = {"in_chans": channels, **model_args, "num_classes": 0}
    if "img_size" in source_args:  # else timm cannot know the shape of a grid
        given["pretrained_model_args"] = dict(source_args)
    try:
        with _timm_notes() as notes:
            backbone: Any = timm.create_model(name, pretrained=True, pretrained_cfg=cfg, **given)
        if notes:
            raise RuntimeError(" ".join(notes))
    except (RuntimeError, AssertionError, NotImplementedError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the weights must be all those of {name} with model_args={dict(model_args)}, and of "
            f"no other model: {_few_keys(one_line(error))}"
        ) from error
    del backbone.pretrained_cfg["state_dict"]
    return backbone


_CFG_FIELDS = PretrainedCfg.__dataclass_fields__.keys()
_PLACES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict")
"""Fields of a pretrained_cfg that say where weights are."""


@contextmanager
def _timm_notes() -> Iterator[list[str]]:
    """Collect what timm only logs: weights that are absent, left over, or not adapted."""
    logger, notes = logging.getLogger("timm.models._builder"), list[str]()
    handler, level = logging.Handler(), logger.level
    telling = ("Missing keys", "Unexpected keys", "Unable to convert")

    def note(record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith(telling):
            notes.append(text)

    handler.emit = note
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield notes
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _few_keys(text: str) -> str:
    """An error of load_state_dict, in which each list of keys is cut after five."""
    return re.sub(r'((?:[\w.]*"?[\w.]+"?, ){5})(?:"?[\w.]+"?, )*"?[\w.]+"?', r"\1...", text)[:600]


# Facts about the weights a timm registry entry was made for; those published here are others.
_PROVENANCE = (
    "tag", "origin_url", "paper_ids", "paper_name", "license", "notes", "description",
    "label_offset", "label_names", "label_descriptions", "architecture", "min_input_size",
    "test_input_size", "test_crop_pct", "test_pool_size",
)  # fmt: skip


def encoder_pretrained_cfg(
    registry: Mapping[str, Any], model_args: Mapping[str, Any], image_size: int | None = None
) -> dict[str, Any]:
    """Make the `pretrained_cfg` of a published encoder, which timm and AutoImageProcessor read.

    Args:
        registry: the backbone's own pretrained_cfg.
        model_args: keyword arguments the backbone was built with.
        image_size: side in pixels of the training views; None takes the backbone's own.
    """
    cfg = filter_pretrained_cfg(dict(registry), remove_source=True, remove_null=True)
    cfg = {key: value for key, value in cfg.items() if key not in _PROVENANCE}
    channels, height, width = cfg["input_size"]
    size = model_args.get("img_size", image_size or (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    channels = model_args.get("in_chans", channels)
    cfg |= {"num_classes": 0, "custom_load": False, "pool_size": None}
    cfg["input_size"] = (channels, height, width)
    for key in ("mean", "std"):  # AutoImageProcessor wants one value per input channel
        if len(cfg[key]) != channels:
            cfg[key] = [sum(cfg[key]) / len(cfg[key])] * channels
    return json.loads(json.dumps(cfg))  # tuples become lists, as they will when read back
