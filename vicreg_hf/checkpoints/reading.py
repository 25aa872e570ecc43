"""Checkpoints that are whole or not there: written aside, listed in a manifest, then renamed.

A checkpoint is a directory `step-N` holding a training model (config.json, model.safetensors),
the optimiser (optimizer.safetensors, optimizer.json), the online probe of a run that has one
(probe.safetensors), and manifest.json with the size and sha256 of every other file, and what they
were made with. Nothing is pickled.

What is saved is copied first, and written by a thread while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vicreg_hf.checkpoints.snapshots import join_tensors
from vicreg_hf.runtime.checks import one_line

MANIFEST = "manifest.json"
FILES = {"config.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"}
PROBE = "probe.safetensors"
"""The one file that may be there or not."""
PREFIX = "step-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


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
    for path in _by_step(folder):
        if before is not None and _step(path) >= before:
            continue
        try:
            fault = _fault(path)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({error}); start again when it can, or move it "
                "away to go on from the one before."
            ) from error
        if fault is None:
            return path, damaged
        damaged.append(f"checkpoint {path} is damaged ({fault}) and is passed over.")
    return None, damaged


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's step, state, world_size, versions and files."""
    return json.loads((path / MANIFEST).read_text())


def read_state(path: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint and the state it was saved with."""
    manifest = read_manifest(path)
    return manifest["step"], manifest["state"]


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Load weights and optimiser state into objects of the same shape.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        weights = load_file(path / "model.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
        state = join_tensors(tensors, json.loads((path / "optimizer.json").read_text()))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    # RuntimeError and ValueError are torch's words for other shapes and other parameter groups.
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError) as error:
        model.load_state_dict(before)
        raise CheckpointError(
            f"checkpoint {path} does not fit this model and optimiser: "
            f"{one_line(error)} Choose another output_dir, or --resume never to "
            "start over."
        ) from error


def load_probe(path: Path) -> dict[str, Tensor] | None:
    """The state of the online probe in a checkpoint that is whole; None where it has none."""
    return load_file(path / PROBE) if PROBE in read_manifest(path)["files"] else None


def _by_step(folder: Path) -> Iterator[Path]:
    """Newest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name)]
    yield from sorted(found, key=_step, reverse=True)


_NAME = re.compile(rf"{PREFIX}(0|[1-9][0-9]*)")


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint; an OSError where that cannot be known."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("sha256") != _digest(manifest):
            return f"{MANIFEST} has another checksum"
        if manifest["step"] != _step(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        if manifest["files"].keys() - {PROBE} != FILES:
            return f"{MANIFEST} lists other files"
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has another size"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} has another checksum"
    except _NOT_THERE as error:
        return f"{type(error).__name__}: {error}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
