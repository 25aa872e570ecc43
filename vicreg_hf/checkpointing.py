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
import os
import platform
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

MANIFEST = "manifest.json"
FILES = {"config.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"}
PROBE = "probe.safetensors"
"""The one file that may be there or not."""
PREFIX = "step-"
KEEP = 2
"""Checkpoints that remain; the older one is there in case the newer is damaged."""
PACKAGES = ("vicreg-hf", "torch", "timm", "transformers", "accelerate", "datasets")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


@dataclass
class Snapshot:
    """Copies of all that training changes, which it does not change any more."""

    config: PretrainedConfig
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Of the optimiser's state."""
    rest: dict[str, Any]
    """What else its state is."""
    probe: dict[str, Tensor]
    """Empty where the run has none."""


def take_snapshot(
    model: PreTrainedModel,
    optimizer: Optimizer,
    reuse: Snapshot | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy weights, optimiser state and the probe's to the CPU.

    Args:
        reuse: a snapshot nobody needs any more, into whose memory to copy.
    """
    tensors, rest = _split_tensors(optimizer.state_dict())
    weights = model.state_dict()
    snapshot = Snapshot(
        model.config,
        _copies(weights, {} if reuse is None else reuse.weights),
        _copies(tensors, {} if reuse is None else reuse.tensors),
        rest,
        _copies(probe or {}, {} if reuse is None else reuse.probe),
    )
    if any(value.is_cuda for value in weights.values()):
        torch.cuda.synchronize()
    return snapshot


def _copies(tensors: Mapping[str, Tensor], reuse: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the CPU's memory; those from a GPU are complete once it is synchronised."""
    copies = {}
    for name, value in tensors.items():
        copy = reuse.get(name)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        copies[name] = copy.copy_(value.detach(), non_blocking=value.is_cuda)
    return copies


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    world_size: int = 1,
    probe: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-N` atomically, then remove all but the newest `KEEP`.

    Args:
        folder: made if absent.
        step: optimiser steps taken.
        state: further JSON values, given back by `read_state`; of its `settings` the manifest
            holds a digest too.
        world_size: processes of the run.
        probe: state of the online probe, given back by `load_probe`.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; checkpoints that were
            there before are left as they were.
    """
    return _write(folder, step, take_snapshot(model, optimizer, probe=probe), state, world_size)


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time; arguments as for `save_checkpoint`.

    What a step waits for is the copy. Memory is that of one checkpoint more.
    """

    def __init__(self, folder: Path, *, world_size: int = 1) -> None:
        self.folder, self.world_size = folder, world_size
        self._thread: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._error: CheckpointError | None = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` says why."""
        return self._error is not None

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        optimizer: Optimizer,
        state: dict[str, Any],
        *,
        probe: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy, and begin to write.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._snapshot = take_snapshot(model, optimizer, self._snapshot, probe)
        self._thread = threading.Thread(
            target=self._work, args=(step, self._snapshot, state), name="checkpoint"
        )
        self._thread.start()

    def _work(self, step: int, snapshot: Snapshot, state: dict[str, Any]) -> None:
        try:
            _write(self.folder, step, snapshot, state, self.world_size)
        except CheckpointError as error:  # raised again by `wait`
            self._error = error

    def wait(self) -> None:
        """Return when what was begun is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _write(
    folder: Path, step: int, snapshot: Snapshot, state: dict[str, Any], world_size: int
) -> Path:
    final, aside = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{PREFIX}*.partial"):  # by a process that was killed
            shutil.rmtree(left)
        aside.mkdir()
        snapshot.config.save_pretrained(aside)
        save_file(snapshot.weights, aside / "model.safetensors", metadata={"format": "pt"})
        save_file(snapshot.tensors, aside / "optimizer.safetensors")
        (aside / "optimizer.json").write_text(json.dumps(snapshot.rest))
        if snapshot.probe:
            save_file(snapshot.probe, aside / PROBE)
        files = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in aside.iterdir()}
        manifest = {
            "step": step,
            "world_size": world_size,
            "versions": installed_versions(),
            "settings_sha256": _digest(state.get("settings")),
            "state": state,
            "files": files,
        }
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
            shutil.rmtree(path, ignore_errors=True)
    return final


def installed_versions() -> dict[str, str]:
    """Versions on which the last bit of a result may depend."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def newest_checkpoint(folder: Path, *, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as its manifest says.

    Args:
        before: a step; only checkpoints of earlier ones count.

    Returns:
        Its path or None, and one sentence for every newer one that is damaged.
    """
    damaged = []
    for path in _by_step(folder):
        if before is not None and _step(path) >= before:
            continue
        fault = _fault(path)
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


def load_probe(path: Path) -> dict[str, Tensor] | None:
    """The state of the online probe in a checkpoint that is whole; None where it has none."""
    return load_file(path / PROBE) if PROBE in read_manifest(path)["files"] else None


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
        if manifest["files"].keys() - {PROBE} != FILES:
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
                tensors[f"{index}.{name}"] = value
            else:
                scalars[str(index)][name] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def _join_tensors(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state = {int(index): dict(entries) for index, entries in rest["scalars"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
