"""Finding the newest checkpoint that is whole, and loading it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vicreg_hf.checkpoints.manifest import (
    MODEL,
    OPTIMIZER,
    OPTIMIZER_REST,
    PROBE,
    CheckpointError,
    find_damage,
    join_tensors,
    newest_first,
    read_manifest,
    step_of,
)
from vicreg_hf.runtime.checks import one_line


def newest_checkpoint(folder: Path, *, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as its manifest says.

    Args:
        before: a step; only checkpoints of earlier ones count.

    Returns:
        Its path or None, and one sentence for every newer one that is damaged.

    Raises:
        CheckpointError: a newer one cannot be read, which says nothing about what it holds.
    """
    damaged = []
    for path in newest_first(folder):
        if before is not None and step_of(path) >= before:
            continue
        try:
            damage = find_damage(path)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({error}); start again when it can, or move it "
                "away to go on from the one before."
            ) from error
        if damage is None:
            return path, damaged
        damaged.append(f"checkpoint {path} is damaged ({damage}) and is passed over.")
    return None, damaged


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Load weights and optimiser state into objects of the same shape.

    Raises:
        CheckpointError: the checkpoint belongs to another model or optimiser.
    """
    try:
        rest = json.loads((path / OPTIMIZER_REST).read_text())
        state = join_tensors(load_file(path / OPTIMIZER), rest)
        model.load_state_dict(load_file(path / MODEL))
        optimizer.load_state_dict(state)
    # torch raises RuntimeError for other shapes and ValueError for other parameter groups
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this model and optimiser: "
            f"{one_line(error)} Choose another output_dir, or --resume never to "
            "start over."
        ) from error


def load_probe(path: Path) -> dict[str, Tensor] | None:
    """The online probe's state in a checkpoint that is whole; None where it has none."""
    return load_file(path / PROBE) if PROBE in read_manifest(path)["files"] else None
