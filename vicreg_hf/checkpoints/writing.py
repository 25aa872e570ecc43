"""Writing checkpoints beside training: each is whole or not there.

What changes is copied first, and written by a thread while training goes on: into a folder aside,
which is renamed once all of it is on the disk. Of a sharded model each process writes its own part;
threads do not wait for those of other processes, so the folder is renamed when the run next waits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
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
    names_of_parts,
    newest_first,
    read_manifest,
    split_tensors,
    step_of,
)
from vicreg_hf.runtime.distributed import (
    OtherProcessFailed,
    failing_together,
    gather_objects,
    own_part,
    rank,
)
from vicreg_hf.runtime.files import sync
from vicreg_hf.runtime.machine import installed_versions

KEEP = 2
"""Newest checkpoints that remain; the older one is there in case the newer is damaged."""


CPU = torch.device("cpu")
Files = dict[str, dict[str, Tensor]]
"""Tensors by the file they are written to."""
Listed = dict[str, dict[str, Any]]
"""Size and SHA-256 of files by their names."""


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, and keeps the newest `KEEP`.

    Beside these it keeps milestones, and the best steps that the newest ones name.

    A step waits for the copy alone. Memory is that of one checkpoint more.

    Args:
        folder: made if absent.
        world_size: processes of the run.
        sharded: each of them holds a part of the model. Then every process must have a writer and
            make the same calls.
    """

    def __init__(self, folder: Path, *, world_size: int = 1, sharded: bool = False) -> None:
        self.folder, self.world_size = folder, world_size
        self.parts = world_size if sharded else 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._begun: tuple[Future[Listed], int, Mapping[str, Any]] | None = None
        """What writes the latest checkpoint, its step and its state, until that is waited for."""
        self._copies: Files = {}
        self._verified: set[Path] = set()
        installed_versions()  # those in use, whatever is installed meanwhile

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` says why."""
        if self._begun is None:
            return False
        future, *_ = self._begun
        return future.done() and future.exception() is not None

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
        if self.parts == 1:
            self._copies = _copy(files, self._copies)
        else:
            with failing_together(CPU), self._explained(step):
                if rank() == 0:
                    self._make_aside(step)
                self._copies = _copy(_own_parts(files, self.parts), self._copies)
        future = self._thread.submit(self._write, step, model.config, self._copies, rest, state)
        self._begun = future, step, state

    def wait(self) -> None:
        """Return when what was begun is on the disk.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; checkpoints that
                were there before are as they were.
            OtherProcessFailed: that happened to another process's part.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        future, step, state = begun
        if self.parts == 1:
            future.result()
            return
        try:
            with failing_together(CPU):
                own = future.result()
            files = dict(gather_objects(list(own.items())))
            with failing_together(CPU), self._explained(step):
                if rank() == 0:
                    self._finish(step, state, files)
        except (CheckpointError, OtherProcessFailed):
            shutil.rmtree(self._aside(step), ignore_errors=True)
            raise

    def _aside(self, step: int) -> Path:
        return self.folder / f".{PREFIX}{step}.partial"

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        # a full disk is an OSError from Python and a SafetensorError from safetensors
        except (OSError, SafetensorError) as error:
            if self.parts == 1:  # else others may be writing to it
                shutil.rmtree(self._aside(step), ignore_errors=True)
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder / f'{PREFIX}{step}'}: {error}. "
                "Earlier checkpoints are untouched; free some space or choose another output_dir, "
                "and start again to resume."
            ) from error

    def _write(
        self,
        step: int,
        config: PretrainedConfig,
        tensors_of: Files,
        optimizer_rest: dict[str, Any],
        state: Mapping[str, Any],
    ) -> Listed:
        """Write the files of this process, and the manifest if they are all."""
        with self._explained(step):
            if self.parts == 1:
                self._make_aside(step)
            aside, names = self._aside(step), list(tensors_of)
            for name, tensors in tensors_of.items():
                save_file(tensors, aside / name, metadata={"format": "pt"})
            if self.parts == 1 or rank() == 0:
                config.save_pretrained(aside)
                (aside / OPTIMIZER_REST).write_text(json.dumps(optimizer_rest))
                names += ["config.json", OPTIMIZER_REST]
            files: Listed = {}
            for name in names:
                size = (aside / name).stat().st_size
                files[name] = {"size": size, "sha256": file_digest(aside / name)}
                sync(aside / name)
            if self.parts == 1:
                self._finish(step, state, files)
        return files

    def _make_aside(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{PREFIX}*.partial"):  # by a process that was killed
            _remove(left)
        self._aside(step).mkdir()

    def _finish(self, step: int, state: Mapping[str, Any], files: Listed) -> None:
        """Write the manifest to a folder that has all other files, and rename it."""
        final, aside = self.folder / f"{PREFIX}{step}", self._aside(step)
        replaced = self.folder / f".{PREFIX}{step}.replaced.partial"
        manifest = {
            "step": step,
            "world_size": self.world_size,
            **({} if self.parts == 1 else {"parts": self.parts}),
            "versions": installed_versions(),
            "settings_sha256": digest(state.get("settings")),
            "state": state,
            "files": files,
        }
        (aside / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest(manifest)}, indent=2))
        sync(aside / MANIFEST)
        sync(aside)
        with suppress(FileNotFoundError):  # a run may stop where it has begun
            final.rename(replaced)
        try:
            aside.rename(final)
        except OSError:
            with suppress(FileNotFoundError):
                replaced.rename(final)
            raise
        sync(self.folder)
        _remove(replaced)
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


def _own_parts(files: Files, parts: int) -> Files:
    """What this process writes of the files: its rows, and the first also what is not sharded."""
    found: Files = {}
    for file, tensors in files.items():
        name = file if file == PROBE else names_of_parts(file, parts)[rank()]
        if rank() == 0 or file != PROBE:
            found[name] = {
                key: own_part(value)
                for key, value in tensors.items()
                if rank() == 0 or isinstance(value, DTensor)
            }
    return found


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
    if any(value.is_cuda for tensors in files.values() for value in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _remove(path: Path) -> None:
    """Remove whatever is there, also where it is no directory."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
