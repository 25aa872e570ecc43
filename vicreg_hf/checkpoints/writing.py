"""Writing checkpoints: whole or not at all, and beside training."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vicreg_hf.checkpoints.reading import (
    MANIFEST,
    PREFIX,
    PROBE,
    CheckpointError,
    _by_step,
    _digest,
    _fault,
    _sha256,
    _step,
)
from vicreg_hf.checkpoints.snapshots import Snapshot, take_snapshot
from vicreg_hf.runtime.files import sync
from vicreg_hf.runtime.machine import installed_versions

KEEP = 2
"""Checkpoints that remain; the older one is there in case the newer is damaged."""


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
