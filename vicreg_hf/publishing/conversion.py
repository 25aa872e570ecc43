"""Checkpoints of other code as published encoders: the authors', lightly's and solo-learn's.

Files are read with weights_only, and every key must find its place.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.hub.card import CARD_FILE, model_card, write_card
from vicreg_hf.hub.export import export_encoder
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.expander import expander
from vicreg_hf.models.resnets import is_ours
from vicreg_hf.models.timm_models import check_architecture, encoder_pretrained_cfg
from vicreg_hf.runtime.checks import one_line

CANDIDATES = (
    "resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "resnet18_cifar", "resnet50x2",
    "resnet200x2", "wide_resnet50_2",
)  # fmt: skip
HEADS = (
    "projector.", "projection_head.", "classifier.", "online_classifier.", "momentum_backbone.",
    "momentum_projector.", "momentum_classifier.", "predictor.", "prediction_head.",
)  # fmt: skip
"""Parts beside the backbone that the authors' code, lightly and solo-learn save."""
SEQUENTIAL = {"0": "conv1", "1": "bn1"} | {str(i + 3): f"layer{i}" for i in range(1, 5)}
"""lightly's examples cut a torchvision ResNet into an nn.Sequential without its last layer."""
EVALUATED = {"0.": "backbone.", "1.": "classifier."}
"""The authors' evaluation saves an nn.Sequential of backbone and classifier."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    directory: Path
    architecture: str
    has_expander: bool
    left_out: tuple[str, ...]
    """Parts of the checkpoint that were not taken."""


def convert_checkpoint(
    checkpoint: str | Path, directory: str | Path, *, architecture: str | None = None
) -> Conversion:
    """Write the published layout from a checkpoint of a ResNet that other code made.

    It reads the authors' files (the backbone only, or with the expander), those of lightly and
    solo-learn, and any that hold a torchvision ResNet under `backbone.` or at the top.

    Args:
        checkpoint: .pth, .pt, .ckpt or .safetensors.
        directory: made if absent.
        architecture: timm name; None finds it by the shapes of the weights.

    Raises:
        ValueError: the file is not a checkpoint, or its weights do not fit; each is listed.
        ExportError: stock loaders do not load the encoder with the same weights and features.
    """
    path = Path(checkpoint)
    state, by_lightning = _read(path)
    backbone, heads = _split(state)
    stem = backbone.get("conv1.weight")
    if stem is None or stem.ndim != 4:
        raise ValueError(
            "a checkpoint must hold a ResNet, whose first weight is conv1.weight, got "
            f"{', '.join(sorted(backbone)[:5])}, ...."
        )
    model_args = {} if stem.shape[1] == 3 else {"in_chans": stem.shape[1]}
    architecture = check_architecture(architecture or _find_architecture(backbone, model_args))
    bare = _on_meta(architecture, model_args)
    _check_fit(backbone, bare, architecture)
    head = {k[len("projector.") :]: v for k, v in heads.items() if k.startswith("projector.")}
    dims = _widths(head)
    expected = expander(bare.head_hidden_size, dims)
    if by_lightning and _shapes(head) != _shapes(expected.state_dict()):
        head = {}  # solo-learn's projector ends with a bias, which an expander has not
    if head:
        _check_fit(head, expected, "an expander")
    config = VICRegConfig(
        architecture=architecture, model_args=model_args or None,
        expander_dims=dims if head else VICRegConfig().expander_dims,
    )  # fmt: skip
    model = VICRegModel(config)
    model.backbone.load_state_dict(backbone)
    if head:
        model.expander.load_state_dict(head)
    config.pretrained_cfg = _preprocessing(config)
    result = export_encoder(model, directory, include_expander=bool(head))
    origin = f"Its weights were converted from the checkpoint `{path.name}`."
    card = model_card(model, origin=origin)
    write_card(result / CARD_FILE, card)
    parts = {name.partition(".")[0] for name in heads}
    taken = {"projector"} if head else set()
    return Conversion(result, architecture, bool(head), tuple(sorted(parts - taken)))


def _read(path: Path) -> tuple[State, bool]:
    """The weights in a file by name, and whether Lightning wrote it; no code in it is executed."""
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, got {str(path)!r}, which is none.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with _inert(path):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError,
        pickle.UnpicklingError, SafetensorError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"checkpoint must be a file of torch.save or safetensors that holds weights and no "
            f"code to run, {path} is not: {one_line(error)[:300]}"
        ) from error
    state, by_lightning = content, False
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state, by_lightning = content[key], key == "state_dict"
            break
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"checkpoint must hold weights by name, and {path} does not.")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"checkpoint must hold nothing but weights, got {len(others)} other values in {path}: "
            f"{', '.join(others[:5])}."
        )
    return {str(name): value for name, value in state.items()}, by_lightning


class _Inert:
    """A stand-in for a class that a checkpoint names, such as its settings'; it does nothing.

    torch.load with weights_only then reads on, and the class is neither imported nor called.
    """

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _inert(path: Path) -> Any:
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # older than torch 1.6, whose files cannot be looked through
        return nullcontext()
    return safe_globals([(_Inert, name) for name in names])  # pyright: ignore[reportArgumentType]


def _split(state: State) -> tuple[State, State]:
    """The backbone with torchvision's names, and the parts beside it."""
    for prefix in ("module.", "_orig_mod.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    if "0.conv1.weight" in state:
        state = {EVALUATED.get(name[:2], name[:2]) + name[2:]: v for name, v in state.items()}
    if not any(name.startswith("backbone.") for name in state):
        classifier = {name: value for name, value in state.items() if name.startswith("fc.")}
        return {k: v for k, v in state.items() if k not in classifier}, classifier
    backbone = {k[len("backbone.") :]: v for k, v in state.items() if k.startswith("backbone.")}
    heads = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    unknown = sorted(name for name in heads if not name.startswith(HEADS))
    if unknown:
        raise ValueError(
            "every weight of a checkpoint must be of a known part (backbone, "
            f"{', '.join(head[:-1] for head in HEADS)}), got {len(unknown)} of others: "
            f"{', '.join(unknown)}."
        )
    if "0.weight" in backbone:
        parts = {name: name.partition(".") for name in backbone}
        backbone = {
            f"{SEQUENTIAL.get(first, first)}.{rest}": backbone[name]
            for name, (first, _, rest) in parts.items()
        }
    return backbone, heads


def _find_architecture(backbone: State, model_args: dict[str, Any]) -> str:
    """The first candidate that fits; else the nearest, whose differences are then listed."""
    differences: dict[str, int] = {}
    for name in CANDIDATES:
        expected = _shapes(_on_meta(name, model_args).state_dict())
        differences[name] = len(_shapes(backbone) ^ expected)
        if not differences[name]:
            break
    return min(differences, key=lambda name: differences[name])


def _on_meta(architecture: str, model_args: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return timm.create_model(architecture, **{**model_args, "num_classes": 0})


def _shapes(state: State) -> set[tuple[str, torch.Size]]:
    return {(name, value.shape) for name, value in state.items()}


def _check_fit(state: State, module: nn.Module, subject: str) -> None:
    try:
        module.to("meta").load_state_dict({name: v.to("meta") for name, v in state.items()})
    except RuntimeError as error:
        raise ValueError(
            f"the weights of a checkpoint must be those of {subject}, and are not. "
            f"{one_line(error)} Name another architecture, if it is another ResNet."
        ) from None


def _widths(head: State) -> list[int]:
    """The widths of the linear layers of an MLP in an nn.Sequential."""
    layers = [(re.fullmatch(r"(\d+)\.weight", name), value) for name, value in head.items()]
    linear = [(int(found[1]), value) for found, value in layers if found and value.ndim == 2]
    return [value.shape[0] for _, value in sorted(linear, key=lambda layer: layer[0])]


def _preprocessing(config: VICRegConfig) -> dict[str, Any]:
    """ImageNet's statistics and the authors' central crop, unless the architecture is ours."""
    cfg = dict(config.pretrained_cfg or {})
    if not is_ours(config.architecture):
        cfg |= {
            "input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        }  # fmt: skip
    return encoder_pretrained_cfg(cfg, config.model_args or {})
