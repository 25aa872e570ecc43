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
import platform
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vicreg_hf.snapshots import Snapshot, join_tensors, take_snapshot
from vicreg_hf.whole_files import sync

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
    snapshot = take_snapshot(model, optimizer, probe=probe)
    return _write(folder, step, snapshot, state, world_size, whole=set())


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time; arguments as for `save_checkpoint`.

    What a step waits for is the copy. Memory is that of one checkpoint more.
    """

    def __init__(self, folder: Path, *, world_size: int = 1) -> None:
        self.folder, self.world_size = folder, world_size
        self._thread: threading.Thread | None = None
        self._snapshot: Snapshot | None = None
        self._error: Exception | None = None
        self._whole: set[Path] = set()
        installed_versions()  # those in use, whatever is installed meanwhile

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
            _write(self.folder, step, snapshot, state, self.world_size, self._whole)
        except Exception as error:  # raised again by `wait`; nothing may pass for saved
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
    folder: Path,
    step: int,
    snapshot: Snapshot,
    state: dict[str, Any],
    world_size: int,
    whole: set[Path],
) -> Path:
    """As `save_checkpoint`; whole are those that need not be verified, and the new one is added."""
    final, aside = folder / f"{PREFIX}{step}", folder / f".{PREFIX}{step}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{PREFIX}*.partial"):  # by a process that was killed
            _remove(left)
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
            sync(file)
        _remove(final)
        aside.rename(final)
        sync(folder)
    # A full disk is an OSError from Python and a SafetensorError from safetensors.
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"a checkpoint could not be written to {final}: {error}. Earlier checkpoints are "
            "untouched; free some space or choose another output_dir, and start again to resume."
        ) from error
    whole.add(final)
    _prune(folder, step, whole)
    return final


def _prune(folder: Path, step: int, whole: set[Path]) -> None:
    """Remove all but the newest `KEEP` that are whole.

    Later steps are of a run that was started over; they must not outlive what replaces them.
    """
    kept = 0
    for path in _by_step(folder):
        if kept < KEEP and _step(path) <= step and (path in whole or _fault(path) is None):
            whole.add(path)
            kept += 1
            continue
        whole.discard(path)
        with suppress(OSError):
            _remove(path)


def _remove(path: Path) -> None:
    """Whatever is there, also where it is no directory."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@cache
def installed_versions() -> dict[str, str]:
    """Versions on which the last bit of a result may depend, as they were when first asked for."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that is not installed
            found[name] = version(name)
    return found


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
            f"{' '.join(str(error).split())} Choose another output_dir, or --resume never to "
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
