"""The files of a model directory that stock AutoModel, timm and `VICRegModel` all load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vicreg_hf.configuration_vicreg import INDEX_FILE, VICRegConfig

ENCODER_FILE = "model.safetensors"
EXPANDER_FILE = "expander.safetensors"
PRIME_FILE = "prime.safetensors"
BY_PREFIX = {"backbone.": ENCODER_FILE, "expander.": EXPANDER_FILE, "prime.": PRIME_FILE}
"""Where a model's weights go. The encoder's bear timm's own names there, without the prefix."""
TRAINING_ONLY = (EXPANDER_FILE, PRIME_FILE, INDEX_FILE)
"""Files beside the encoder, which it does not need."""


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
        include_expander: also write the expander, and the second branch if there is one.
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
        write_json(
            directory / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    else:
        (directory / INDEX_FILE).unlink(missing_ok=True)
    content = config.to_encoder_dict(num_features, include_expander=include_expander)
    write_json(directory / "config.json", content)
    for name in set(weight_map.values()):  # safetensors lets nobody else read them
        shutil.copymode(directory / "config.json", directory / name)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, numbers in float32, and no two in the same memory, as those of tied weights."""
    found, seen = {}, set()
    for name, value in state.items():
        copy = value.detach().cpu()
        copy = (copy.float() if copy.is_floating_point() else copy).contiguous()
        found[name] = copy.clone() if copy.data_ptr() in seen else copy
        seen.add(copy.data_ptr())
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file as the loaders' own are written."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


DIRECTORY = "encoder_prime"
"""Of the second encoder, beside `encoder` in a run's output_dir."""
