"""Saving a run and going on with it: what a checkpoint must have in common with the settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer

from vicreg_hf.checkpoints.reading import (
    CheckpointError,
    load_checkpoint,
    load_probe,
    newest_checkpoint,
    read_manifest,
)
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.machine import installed_versions
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.monitoring.probe import OnlineProbe
from vicreg_hf.training.run import Run

FREE_TO_CHANGE = {
    "output_dir", "resume", "resume_changed", "num_workers", "compile", "compile_model",
    "max_bad_fraction", "logging_steps", "save_steps", "knn_steps", "online_probe",
    "push_to_hub", "hub_model_id", "hub_private",
    "dataset_name",  # a folder may move; the data's fingerprint tells whether it is another
}  # fmt: skip
"""Settings that say where and how often, not what is computed."""
MUST_STAY = {
    "architecture", "model_args", "pretrained", "expander_dims", "optimizer", "batch_size", "seed",
    "dataset_config_name", "train_split", "image_column", "streaming", "weights",
    "prime_modality", "prime_column", "prime_architecture", "prime_model_args", "prime_pretrained",
    "prime_tokenizer", "prime_max_length", "prime_expander_dims", "audio_seconds",
    "sampling_rate", "num_global_views", "num_local_views",
    "variance_reduction", "lars_clip",
}  # fmt: skip
"""Settings without which it is another run; any other may change, and that is said."""
LENGTH = {"num_train_epochs", "max_steps"}
"""Settings that say how long a run is, each in its own way."""


def resume(
    args: PretrainingArguments,
    accelerator: Accelerator,
    model: VICRegModel,
    optimizer: Optimizer,
    fingerprint: dict[str, Any],
    *,
    total_steps: int,
    probe: OnlineProbe | None = None,
    before: int | None = None,
) -> tuple[int, float]:
    """Load the newest checkpoint that is whole.

    Args:
        fingerprint: of the data.
        total_steps: of the whole run, as the settings say.
        probe: of this session; it starts anew where the checkpoint has none of these labels.
        before: a step; only checkpoints of earlier ones count.

    Returns:
        The step to go on from, 0 where nothing was saved, and the seconds it took to reach it.

    Raises:
        CheckpointError: resuming was required and nothing valid is there, or it is of another run.
    """
    if args.resume == "never":
        return 0, 0.0
    folder = Path(str(args.output_dir)) / "checkpoints"
    path, damaged = newest_checkpoint(folder, before=before)
    for sentence in damaged:
        accelerator.print(f"warning: {sentence}")
    _check_all_see(path, folder)
    if path is None:
        if args.resume == "required":
            raise CheckpointError(
                f"resume=required, but {folder} holds no valid checkpoint. Choose the output_dir "
                "of the run to go on with, or --resume auto to begin where there is none."
            )
        if damaged:
            raise CheckpointError(
                f"{folder} must hold a checkpoint that is whole, and every one there is damaged. "
                "Mend one, choose another output_dir, or --resume never to start over, which moves "
                "them aside."
            )
        return 0, 0.0
    manifest = read_manifest(path)
    state = manifest["state"]
    ended = manifest["step"] == total_steps
    changed = _changes(args, state, fingerprint, digest_of(model), ended=ended)
    another = bool(changed.keys() & {*MUST_STAY, "dataset_name"})
    if ended:
        shortened = state.get("total_steps", 0) > total_steps
        _check_ended(changed, args, path, another=another, shortened=shortened)
    elif another and not args.resume_changed:
        raise CheckpointError(
            f"a resumed run must keep its model, batch, seed and data, but against {path}: "
            f"{_listed(changed)}. Choose another output_dir, --resume never to start over, or "
            "--resume_changed true to go on nevertheless."
        )
    _check_length(args, manifest["step"], total_steps, path)
    if changed:
        accelerator.print(f"warning: settings have changed since {path}: {_listed(changed)}.")
    load_checkpoint(path, model, optimizer)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"Resuming from {path}.")
    _mention_surroundings(accelerator, manifest)
    if probe is not None:
        _resume_probe(accelerator, probe, state, path)
    return manifest["step"], state.get("seconds", 0.0)


def _resume_probe(
    accelerator: Accelerator, probe: OnlineProbe, state: dict[str, Any], path: Path
) -> None:
    saved = load_probe(path)
    if saved is None:
        accelerator.print(f"The online probe starts anew: {path} holds none.")
    elif state.get("labels_sha256") != probe.labels_sha256:
        accelerator.print(f"The online probe starts anew: that of {path} is of other labels.")
    else:
        probe.load_state_dict(saved)


def _check_all_see(path: Path | None, folder: Path) -> None:
    seen = gather_object([None if path is None else path.name])
    if any(name != seen[0] for name in seen):
        raise CheckpointError(
            f"every process must see the same checkpoints in {folder}, and the newest is "
            f"{', '.join(str(name or 'none') for name in seen)}; choose an output_dir that all "
            "nodes share."
        )


def digest_of(model: VICRegModel) -> str | None:
    """Of the second branch's description, its encoder's own configuration included."""
    if model.config.prime is None:
        return None
    text = json.dumps(model.config.prime, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint holds of a run besides weights, optimiser, probe and step."""
    scaler = run.accelerator.scaler
    return {
        "settings": asdict(run.args),
        "total_steps": run.total_steps,
        "data": run.fingerprint,
        "seconds": run.seconds,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "precision": run.accelerator.mixed_precision,
        "threads": _threads(run.accelerator),
        "prime_sha256": digest_of(run.model),
        "labels_sha256": None if run.probe is None else run.probe.labels_sha256,
    }


def _threads(accelerator: Accelerator) -> int | None:
    """Of a process, among which torch divides its sums on a CPU."""
    return torch.get_num_threads() if accelerator.device.type == "cpu" else None


def _changes(
    args: PretrainingArguments,
    state: dict[str, Any],
    fingerprint: dict[str, Any],
    prime_sha256: str | None,
    *,
    ended: bool,
) -> dict[str, str]:
    """What is computed otherwise than before, by the name of the setting."""
    free = FREE_TO_CHANGE - {"online_probe"} if ended else FREE_TO_CHANGE  # it would learn nothing
    saved, now = state["settings"], json.loads(json.dumps(asdict(args)))
    changed = {
        f.name: f"{f.name} was {saved[f.name]}, is {now[f.name]}"
        for f in fields(args)
        if f.name not in free and f.name in saved and saved[f.name] != now[f.name]
    }
    if state["data"] != fingerprint:
        changed["dataset_name"] = (
            f"the data were {_of(state['data'])}, are {_of(fingerprint)}, in {args.dataset_name}"
        )
    if state.get("prime_sha256") not in (None, prime_sha256):
        changed["prime_architecture"] = changed.get(
            "prime_architecture", "the second encoder's own configuration is another"
        )
    return changed


def _check_length(args: PretrainingArguments, step: int, total_steps: int, path: Path) -> None:
    if total_steps < step:
        raise CheckpointError(
            f"{_length(args)} must be at least the {step} steps that were taken, got "
            f"{total_steps} and {path}; choose more, another output_dir, or --resume never to "
            "start over."
        )


def _check_ended(
    changed: dict[str, str],
    args: PretrainingArguments,
    path: Path,
    *,
    another: bool,
    shortened: bool,
) -> None:
    """Refuse settings that no step was taken with, and that would only be written down.

    Args:
        another: it would be another run.
        shortened: more steps were meant to be taken; the warm-up may depend on their number.
    """
    if changed.keys() - LENGTH - ({"warmup_epochs"} if shortened else set()):
        raise CheckpointError(
            f"a run that has taken all its steps must keep its settings, but against {path}: "
            f"{_listed(changed)}. Choose another output_dir, --resume never to start over, or more "
            f"--{_length(args)}{', and --resume_changed true,' if another else ''} to go on with "
            "them."
        )


def _length(args: PretrainingArguments) -> str:
    """The setting that says how long the run is."""
    return "num_train_epochs" if args.max_steps is None else "max_steps"


def _listed(changed: dict[str, str]) -> str:
    return "; ".join(changed.values())


def _of(fingerprint: dict[str, Any]) -> str:
    digests = [str(v)[:8] for k, v in fingerprint.items() if k.endswith("sha256")]
    return f"{fingerprint['images']} images of SHA-256 {' and '.join(digests)}"


def _mention_surroundings(accelerator: Accelerator, manifest: dict[str, Any]) -> None:
    """Say what may make a difference in the last bits."""
    versions, now = manifest["versions"], installed_versions()
    changed = [f"{name} was {versions.get(name)}, is {now[name]}"
               for name in now if versions.get(name) != now[name]]  # fmt: skip
    before, precision = manifest["state"].get("precision"), accelerator.mixed_precision
    if before != precision:
        changed.append(f"precision was {before}, is {precision}")
    if manifest["world_size"] != accelerator.num_processes:
        changed.append(f"processes were {manifest['world_size']}, are {accelerator.num_processes}")
    threads, own = manifest["state"].get("threads"), _threads(accelerator)
    if None not in (threads, own) and threads != own:  # earlier checkpoints do not say
        changed.append(f"CPU threads of a process were {threads}, are {own}")
    if changed:
        accelerator.print(f"The run goes on as it was but for rounding: {'; '.join(changed)}.")
