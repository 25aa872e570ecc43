"""Saving a run: the contents of its checkpoints, and waiting until one is on the disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator

from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.training.faults import check_state_is_finite
from vicreg_hf.training.run import Run


def save(run: Run) -> None:
    """Begin to write a checkpoint; every process must call this.

    Raises:
        FloatingPointError: weights, statistics or optimiser state are not finite.
        CheckpointError: the previous checkpoint could not be written.
        OtherProcessFailed: that happened in the main process.
    """
    check_state_is_finite(run)
    with failing_together(run.accelerator.device):
        if run.accelerator.is_main_process:
            run.writer.save(
                run.step, run.model, run.inner_optimizer, state_to_save(run),
                probe=None if run.probe is None else run.probe.state_dict(),
            )  # fmt: skip


def wait_until_saved(run: Run) -> None:
    """Wait until the latest checkpoint is on the disk; every process must call this.

    Raises:
        CheckpointError: it could not be written.
        OtherProcessFailed: that happened in the main process.
    """
    with failing_together(run.accelerator.device):
        run.writer.wait()


def state_to_save(run: Run) -> dict[str, Any]:
    """A checkpoint's values besides weights, optimiser state, probe and step."""
    scaler = run.accelerator.scaler
    return {
        "settings": asdict(run.args),
        "total_steps": run.total_steps,
        "data": run.fingerprint,
        "seconds": run.seconds,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "precision": run.accelerator.mixed_precision,
        "threads": cpu_threads(run.accelerator),
        "prime_sha256": prime_sha256(run.model),
        "labels_sha256": None if run.probe is None else run.probe.labels_sha256,
    }


def cpu_threads(accelerator: Accelerator) -> int | None:
    """Threads over which torch divides a process's sums on a CPU; None on other devices."""
    return torch.get_num_threads() if accelerator.device.type == "cpu" else None


def prime_sha256(model: VICRegModel) -> str | None:
    """SHA-256 of the second branch's configuration, with that of its encoder."""
    if model.config.prime is None:
        return None
    text = json.dumps(model.config.prime, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
