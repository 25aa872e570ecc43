"""The files of a model directory that stock AutoModel, timm and `VICRegModel` all load."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vicreg_hf.configuration_vicreg import (
    INDEX_FILE,
    LOCAL_FIELDS,
    NESTED_KEY,
    PRIME_FIELDS,
    VICRegConfig,
)

CONFIG_FILE = "config.json"
ENCODER_FILE = "model.safetensors"
EXPANDER_FILE = "expander.safetensors"
LOCAL_FILE = "local_expander.safetensors"
PRIME_FILE = "prime.safetensors"
BY_PREFIX = {
    "backbone.": ENCODER_FILE, "expander.": EXPANDER_FILE, "local_expander.": LOCAL_FILE,
    "prime.": PRIME_FILE,
}  # fmt: skip
"""The file of a weight, by the prefix of its name; the encoder's bear timm's names there, without
the prefix."""
TRAINING_ONLY = (EXPANDER_FILE, LOCAL_FILE, PRIME_FILE, INDEX_FILE)
"""Files beside the encoder that are needed only to go on training."""
PRIME_DIRECTORY = "encoder_prime"
"""The second encoder's directory, beside `encoder` in the output_dir of a run."""


def write_layout(
    directory: Path,
    state: Mapping[str, Tensor],
    config: VICRegConfig,
    *,
    num_features: int,
    include_expander: bool,
) -> None:
    """Write weights, in float32, and config.json.

    Args:
        directory: made if absent; of earlier files only those of this layout are replaced.
        state: of a `VICRegModel`.
        num_features: F, width of the encoder's output.
        include_expander: also write the expander, and the local expander and the second branch if
            there are such.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = _apart(state)
    include_expander = include_expander and any(k.startswith("expander.") for k in state)
    weight_map: dict[str, str] = {}
    for prefix, name in BY_PREFIX.items():
        held = {k: v for k, v in state.items() if k.startswith(prefix)}
        if not held or (name in TRAINING_ONLY and not include_expander):
            (directory / name).unlink(missing_ok=True)
            continue
        if name == ENCODER_FILE:
            held = {k.removeprefix(prefix): v for k, v in held.items()}
        save_file(held, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    if include_expander:
        size = sum(v.numel() * v.element_size() for v in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_bytes(_json(index))
    else:
        (directory / INDEX_FILE).unlink(missing_ok=True)
    content = config.to_encoder_dict(num_features, include_expander=include_expander)
    (directory / CONFIG_FILE).write_bytes(_json(content))
    for name in set(weight_map.values()):  # safetensors lets nobody else read them
        shutil.copymode(directory / CONFIG_FILE, directory / name)


def read_layout(directory: Path) -> dict[str, Tensor]:
    """All weights in a directory of this layout, by the names of a `VICRegModel`."""
    state: dict[str, Tensor] = {}
    for prefix, name in BY_PREFIX.items():
        if (directory / name).is_file():
            own = prefix if name == ENCODER_FILE else ""
            state |= {own + key: value for key, value in load_file(directory / name).items()}
    return state


def trainers_checkpoint(encoder: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """All weights of the checkpoint that transformers' `Trainer` is loading now.

    `Trainer` reads ENCODER_FILE and hands over what is in it, but not where it lies. That is known
    to its method, which is among the callers: a resumed checkpoint's or the best one's directory.
    A directory counts if its encoder is the one that was handed over, bit for bit.

    Args:
        encoder: the weights that were handed over.

    Returns:
        None where no `Trainer` is calling, or the expander does not lie beside the encoder.
    """
    trainer = sys.modules.get("transformers.trainer")
    frame = None if trainer is None else sys._getframe(1)
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if frame.f_globals.get("__name__") == "transformers.trainer" and hasattr(caller, "state"):
            places = (frame.f_locals.get("resume_from_checkpoint"),
                      getattr(caller.state, "best_model_checkpoint", None))  # fmt: skip
            for place in filter(None, places):
                state = read_layout(Path(str(place)))
                same = (torch.equal(v, state[f"backbone.{k}"]) for k, v in encoder.items()
                        if f"backbone.{k}" in state)  # fmt: skip
                if len(state) > len(encoder) and all(same):
                    return state
        frame = frame.f_back
    return None


def is_published(directory: Path) -> bool:
    """Whether a directory holds an encoder in this layout."""
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    return config.get("model_type") == "timm_wrapper" and NESTED_KEY in config


def files_to_push(directory: Path, *, include_expander: bool) -> dict[str, Path | bytes]:
    """The files of this layout in a directory, by name, as paths or as their content."""
    names = (CONFIG_FILE, ENCODER_FILE, *(TRAINING_ONLY if include_expander else ()))
    files: dict[str, Path | bytes] = {
        name: directory / name for name in names if (directory / name).is_file()
    }
    if not include_expander:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        for key in ("transformers_weights", *PRIME_FIELDS, *LOCAL_FIELDS):
            config[NESTED_KEY].pop(key, None)
        files[CONFIG_FILE] = _json(config)
    return files


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, in float32, each in memory of its own even if weights are tied."""
    found, seen = {}, set()
    for name, value in state.items():
        copy = value.detach().cpu()
        copy = (copy.float() if copy.is_floating_point() else copy).contiguous()
        found[name] = copy.clone() if copy.data_ptr() in seen else copy
        seen.add(copy.data_ptr())
    return found


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
