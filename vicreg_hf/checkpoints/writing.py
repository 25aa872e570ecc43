"""Writing checkpoints beside training: each is whole or not there.

What changes is copied first, and written by a thread while training goes on: into a folder aside,
which is renamed once all of it is on the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from vicreg_hf.checkpoints.reading import (
    AVERAGE,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    OPTIMIZER_REST,
    PREFIX,
    PROBE,
    CheckpointError,
    RunState,
    digest,
    file_digest,
    find_damage,
    newest_first,
    read_manifest,
    split_tensors,
    step_of,
)
from vicreg_hf.runtime.files import sync
from vicreg_hf.runtime.machine import installed_versions

KEEP = 2
"""Newest checkpoints that remain; the older one is there in case the newer is damaged."""


Files = dict[str, dict[str, Tensor]]
"""Tensors by the file they are written to."""


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, and keeps the newest `KEEP`.

    Beside these it keeps milestones, and the best steps that the newest ones name.

    A step waits for the copy alone. Memory is that of one checkpoint more.

    Args:
        folder: made if absent.
        world_size: processes of the run.
    """

    def __init__(self, folder: Path, *, world_size: int = 1) -> None:
        self.folder, self.world_size = folder, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: Future[None] | None = None
        self._copies: Files = {}
        self._verified: set[Path] = set()
        installed_versions()  # those in use, whatever is installed meanwhile

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` says why."""
        begun = self._begun
        return begun is not None and begun.done() and begun.exception() is not None

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        optimizer: Optimizer,
        state: RunState | Mapping[str, Any],
        *,
        probe: Mapping[str, Tensor] | None = None,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy what training changes, and begin to write `folder/step-N`.

        Args:
            step: N, optimiser steps taken.
            state: JSON values, those of a `RunState`.
            probe: state of the online probe, for `load_probe`.
            average: moving average of the model's state, for `load_average`.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        tensors, rest = split_tensors(optimizer.state_dict())
        files = {MODEL: model.state_dict(), OPTIMIZER: tensors}
        for file, more in ((PROBE, probe), (AVERAGE, average)):
            if more:
                files[file] = dict(more)
        self._copies = _copy(files, self._copies)
        self._begun = self._thread.submit(
            self._write, step, model.config, self._copies, rest, state
        )

    def wait(self) -> None:
        """Return when what was begun is on the disk.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; checkpoints that
                were there before are as they were.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def _write(
        self,
        step: int,
        config: PretrainedConfig,
        tensors_of: Files,
        optimizer_rest: dict[str, Any],
        state: Mapping[str, Any],
    ) -> None:
        final = self.folder / f"{PREFIX}{step}"
        aside = self.folder / f".{PREFIX}{step}.partial"
        replaced = self.folder / f".{PREFIX}{step}.replaced.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f".{PREFIX}*.partial"):  # by a process that was killed
                _remove(left)
            aside.mkdir()
            config.save_pretrained(aside)
            for name, tensors in tensors_of.items():
                save_file(tensors, aside / name, metadata={"format": "pt"})
            (aside / OPTIMIZER_REST).write_text(json.dumps(optimizer_rest))
            manifest = {
                "step": step,
                "world_size": self.world_size,
                "versions": installed_versions(),
                "settings_sha256": digest(state.get("settings")),
                "state": state,
                "files": {
                    file.name: {"size": file.stat().st_size, "sha256": file_digest(file)}
                    for file in aside.iterdir()
                },
            }
            manifest["sha256"] = digest(manifest)
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
            for file in (*aside.iterdir(), aside):
                sync(file)
            with suppress(FileNotFoundError):  # a run may stop where it has begun
                final.rename(replaced)
            aside.rename(final)
            sync(self.folder)
            _remove(replaced)
        # a full disk is an OSError from Python and a SafetensorError from safetensors
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"a checkpoint could not be written to {final}: {error}. Earlier checkpoints are "
                "untouched; free some space or choose another output_dir, and start again to "
                "resume."
            ) from error
        self._verified.add(final)
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Remove all but the newest `KEEP` that are whole, milestones and the best.

        The best is what one of the newest names: where the newer is damaged, a run goes on from the
        older and needs the best of that. Later steps are of a run that was started over; they must
        not outlive what replaces them.
        """
        kept, best = 0, set()
        for path in newest_first(self.folder):
            if kept < KEEP and step_of(path) <= step and self._is_whole(path):
                kept += 1
                best.add((_state_of(path).get("best") or {}).get("step"))
                continue
            if step_of(path) < step and (step_of(path) in best or _state_of(path).get("milestone")):
                continue
            self._verified.discard(path)
            with suppress(OSError):
                _remove(path)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._verified and find_damage(path) is None:
            self._verified.add(path)
        return path in self._verified


def _state_of(path: Path) -> dict[str, Any]:
    """The run's values in a checkpoint's manifest; none where that cannot be read."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return dict(read_manifest(path)["state"])
    return {}


def _copy(files: Files, reuse: Files) -> Files:
    """Copy tensors to the CPU, into the memory of earlier copies where shapes allow."""
    copies: Files = {}
    for file, tensors in files.items():
        copies[file] = {}
        for name, value in tensors.items():
            copy = reuse.get(file, {}).get(name)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            copies[file][name] = copy.copy_(value.detach(), non_blocking=value.is_cuda)
    if any(value.is_cuda for value in files[MODEL].values()):
        torch.cuda.synchronize()
    return copies


def _remove(path: Path) -> None:
    """Remove whatever is there, also where it is no directory."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
