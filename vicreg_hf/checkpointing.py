"""Checkpoints that are whole or not there: written aside, listed in a manifest, then renamed.

A checkpoint is a directory `step-N` holding a training model (config.json, model.safetensors),
the optimiser (optimizer.safetensors, optimizer.json) and manifest.json with the size and sha256 of
every other file. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

MANIFEST = "manifest.json"
FILES = {"config.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"}
PREFIX = "step-"
KEEP = 2
"""Checkpoints that remain; the older one is there in case the newer is damaged."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


def save_checkpoint(
    folder: Path, step: int, model: PreTrainedModel, optimizer: Optimizer, state: dict[str, Any]
) -> Path:
    """Write `folder/step-N` atomically, then remove all but the newest `KEEP`.

    Args:
        folder: made if absent.
        step: optimiser steps taken.
        state: further JSON values, given back by `load_checkpoint`.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; checkpoints that were
            there before are left as they were.
    """
    final, aside = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        model.config.save_pretrained(aside)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        tensors, rest = _split_tensors(optimizer.state_dict())
        save_file(tensors, aside / "optimizer.safetensors")
        (aside / "optimizer.json").write_text(json.dumps(rest))
        files = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in aside.iterdir()}
        manifest = {"step": step, "state": state, "files": files}
        manifest["sha256"] = _digest(manifest)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for file in (*aside.iterdir(), aside):
            _fsync(file)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _fsync(folder)
    # A full disk is an OSError from Python and a SafetensorError from safetensors.
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"a checkpoint could not be written to {final}: {error}. Earlier checkpoints are "
            "untouched; free some space or choose another output_dir, and start again to resume."
        ) from error
    # Later steps are of a run that was started over; they must not outlive what replaces them.
    kept = [path for path in _by_step(folder) if _step(path) <= step][:KEEP]
    for path in _by_step(folder):
        if path not in kept:
            shutil.rmtree(path)
    return final


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as its manifest says.

    Returns:
        Its path or None, and one sentence for every newer one that is damaged.
    """
    damaged = []
    for path in _by_step(folder):
        fault = _fault(path)
        if fault is None:
            return path, damaged
        damaged.append(f"checkpoint {path} is damaged ({fault}) and is passed over.")
    return None, damaged


def read_state(path: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint and the state it was saved with."""
    manifest = json.loads((path / MANIFEST).read_text())
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
        state = _join_tensors(tensors, json.loads((path / "optimizer.json").read_text()))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    # RuntimeError and ValueError are torch's words for other shapes and other parameter groups.
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError) as error:
        model.load_state_dict(before)
        raise CheckpointError(
            f"checkpoint {path} does not fit this model and optimiser: "
            f"{' '.join(str(error).split())} Choose another output_dir, or --resume never to "
            "start over."
        ) from error


def _by_step(folder: Path) -> Iterator[Path]:
    """Newest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    yield from sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("sha256") != _digest(manifest):
            return f"{MANIFEST} has another checksum"
        if manifest["step"] != _step(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        if manifest["files"].keys() != FILES:
            return f"{MANIFEST} lists other files"
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has another size"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _split_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as a flat dict of tensors and JSON for everything else."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        scalars[str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars[str(index)][name] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def _join_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(entries) for index, entries in rest["scalars"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
