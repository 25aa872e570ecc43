"""Saving a run, and going on with it although settings may have changed."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vicreg_hf.checkpoints.reading import (
    CheckpointError,
    load_average,
    load_checkpoint,
    load_probe,
    newest_checkpoint,
    read_manifest,
)
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.distributed import failing_together, gather_objects
from vicreg_hf.runtime.machine import installed_versions
from vicreg_hf.training.choosing import is_milestone, resume_best
from vicreg_hf.training.faults import check_state_is_finite
from vicreg_hf.training.run import Run

FREE_TO_CHANGE = {
    "output_dir", "resume", "resume_changed", "num_workers", "compile", "compile_model",
    "gradient_checkpointing", "max_bad_fraction", "logging_steps", "save_steps", "keep_every",
    "knn_steps", "report_to", "push_to_hub", "hub_model_id", "hub_private",
    "publish_images", "license",
    "dataset_name",  # a folder may move; the fingerprint tells whether the data are others
}  # fmt: skip
"""Settings that say where and how often, and change nothing that is computed."""
MUST_STAY = {
    "architecture", "model_args", "pretrained", "init_from", "prime_init_from",
    "expander_dims", "optimizer", "batch_size", "seed",
    "dataset_config_name", "train_split", "image_column", "value_range", "decode", "streaming",
    "weights",
    "prime_modality", "prime_column", "prime_architecture", "prime_model_args", "prime_pretrained",
    "prime_tokenizer", "prime_max_length", "prime_expander_dims", "audio_seconds",
    "sampling_rate", "num_global_views", "num_local_views",
    "variance_reduction", "local_weight", "local_expander_dims", "lars_clip", "optimizer_args",
    "layer_decay", "freeze", "ema_decay", "loss",
}  # fmt: skip
"""Settings that make it another run; any other may change, and the run says so."""
LENGTH = {"num_train_epochs", "max_steps"}
"""Settings that say how long a run is."""


def resume(run: Run, *, before: int | None = None) -> None:
    """Go on from the newest checkpoint that is whole, if there is one, as settings ask.

    The online probe starts anew unless the checkpoint has one of the same labels.

    Args:
        before: a step; later checkpoints are passed over.

    Raises:
        CheckpointError: resuming was required and nothing valid is there, or it is of another run.
    """
    args, accelerator, probe = run.args, run.accelerator, run.probe
    if args.resume == "never":
        return
    folder = run.writer.folder
    path, damaged = newest_checkpoint(folder, before=before)
    for sentence in damaged:
        accelerator.print(f"warning: {sentence}")
    _check_same_everywhere(path, folder)
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
        return
    manifest = read_manifest(path)
    state = manifest["state"]
    if state["settings"].get("decode", "exact") == "exact" and args.decode != "exact":
        run.args = args = replace(args, decode="exact")  # before it was a setting, the only way
        accelerator.print(f"decode=exact, as {path} was trained so.")
    if (reason := state.get("ended_by")) and step_of_end(run, manifest) is not None:
        run.inputs.total_steps = manifest["step"]
        accelerator.print(f"The run was ended after step {manifest['step']}: {reason}.")
    changed = _changes(run, state)
    if manifest["step"] != run.total_steps:  # else a new probe would learn nothing
        changed.pop("online_probe", None)
    _check_settings(run, changed, path, manifest)
    if changed:
        listed = "; ".join(changed.values())
        accelerator.print(f"warning: settings have changed since {path}: {listed}.")
    load_checkpoint(path, run.model, run.inner_optimizer)
    if run.average is not None and not load_average(path, run.average.module):
        run.average.set(run.model)
        accelerator.print(f"The average begins with the weights of {path}, which holds none.")
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"Resuming from {path}.")
    _report_causes_of_rounding(run, manifest)
    if probe is not None:
        saved = load_probe(path)
        if saved is None:
            accelerator.print(f"The online probe starts anew: {path} holds none.")
        elif state.get("labels_sha256") != probe.labels_sha256:
            accelerator.print(f"The online probe starts anew: that of {path} is of other labels.")
        else:
            probe.load_state_dict(saved)
    run.step = run.first_step = manifest["step"]
    run.seconds_before = state.get("seconds", 0.0)
    resume_best(run, state.get("best"))


def step_of_end(run: Run, manifest: dict[str, Any]) -> int | None:
    """The last step of a run that a callback ended, unless it is now given more than planned."""
    step, planned = manifest["step"], manifest["state"].get("total_steps", 0)
    return step if step <= run.total_steps <= planned else None


def _check_same_everywhere(path: Path | None, folder: Path) -> None:
    names = gather_objects([None if path is None else path.name])
    if any(name != names[0] for name in names):
        raise CheckpointError(
            f"every process must see the same checkpoints in {folder}, and the newest is "
            f"{', '.join(str(name or 'none') for name in names)}; choose an output_dir that all "
            "nodes share."
        )


def _changes(run: Run, state: dict[str, Any]) -> dict[str, str]:
    """Settings, data and second encoder that differ from the checkpoint's: a phrase for each."""
    args, fingerprint = run.args, run.fingerprint
    # a setting that the checkpoint does not know had its default; JPEGs were decoded whole
    saved = {f.name: f.default for f in fields(args)} | {"decode": "exact"} | state["settings"]
    now = json.loads(json.dumps(asdict(args)))
    changed = {
        f.name: f"{f.name} was {saved[f.name]}, is {now[f.name]}"
        for f in fields(args)
        if f.name not in FREE_TO_CHANGE and saved[f.name] != now[f.name]
    }
    for setting, start in run.starts.items():  # the source may have moved
        was = (state.get("starts") or {}).get(setting)
        if was is not None and was["sha256"] == start["sha256"]:
            changed.pop(setting, None)
    if state["data"] != fingerprint:
        was, is_now = (
            f"{data['images']} images of SHA-256 "
            + " and ".join(str(v)[:8] for k, v in data.items() if k.endswith("sha256"))
            for data in (state["data"], fingerprint)
        )
        changed["dataset_name"] = f"the data were {was}, are {is_now}, in {args.dataset_name}"
    if (was := state.get("loss")) != run.loss_name:
        changed["loss"] = f"the loss was {was or 'VICReg'}, is {run.loss_name or 'VICReg'}"
    if state.get("prime_sha256") not in (None, _prime_sha256(run.model)):
        changed.setdefault(
            "prime_architecture", "the second encoder's own configuration is another"
        )
    return changed


def _check_settings(
    run: Run, changed: dict[str, str], path: Path, manifest: dict[str, Any]
) -> None:
    """Refuse to go on as another run, and to describe steps by settings they were not taken with.

    Args:
        changed: see `_changes`.
        path: of the checkpoint; likewise manifest.
    """
    args, total_steps = run.args, run.total_steps
    listed = "; ".join(changed.values())
    length = "num_train_epochs" if args.max_steps is None else "max_steps"
    another_run = bool(changed.keys() & {*MUST_STAY, "dataset_name"})
    step, planned = manifest["step"], manifest["state"].get("total_steps", 0)
    if total_steps == step:
        # a run that ends early has a warm-up that fitted its planned length
        free = LENGTH | ({"warmup_epochs"} if planned > total_steps else set())
        if changed.keys() - free:
            raise CheckpointError(
                f"a run that has taken all its steps must keep its settings, but against {path}: "
                f"{listed}. Choose another output_dir, --resume never to start over, or more "
                f"--{length}{', and --resume_changed true,' if another_run else ''} to go on with "
                "them."
            )
    elif another_run and not args.resume_changed:
        raise CheckpointError(
            f"a resumed run must keep its model, batch, seed and data, but against {path}: "
            f"{listed}. Choose another output_dir, --resume never to start over, or "
            "--resume_changed true to go on nevertheless."
        )
    if total_steps < step:
        raise CheckpointError(
            f"{length} must be at least the {step} steps that were taken, got {total_steps} and "
            f"{path}; choose more, another output_dir, or --resume never to start over."
        )


def _report_causes_of_rounding(run: Run, manifest: dict[str, Any]) -> None:
    """Print what may change the last bits of a result: versions, precision, processes, threads."""
    accelerator = run.accelerator
    state, versions, now = manifest["state"], manifest["versions"], installed_versions()
    pairs: list[tuple[str, str, Any, Any]] = [
        (f"{name} was", "is", versions.get(name), now[name]) for name in now
    ]
    pairs += [
        ("precision was", "is", state.get("precision"), accelerator.mixed_precision),
        ("processes were", "are", manifest["world_size"], accelerator.num_processes),
        ("parts of the model were", "are", manifest.get("parts", 1), run.writer.parts),
    ]
    threads = state.get("threads"), _cpu_threads(accelerator)
    if None not in threads:  # earlier versions did not save it
        pairs.append(("CPU threads of a process were", "are", *threads))
    if changed := [f"{were} {old}, {are} {new}" for were, are, old, new in pairs if old != new]:
        accelerator.print(f"The run goes on as it was but for rounding: {'; '.join(changed)}.")


def save(run: Run) -> None:
    """Begin to write a checkpoint; every process must call this.

    Raises:
        FloatingPointError: weights, statistics or optimiser state are not finite.
        CheckpointError: the previous checkpoint could not be written.
        OtherProcessFailed: that happened in the main process.
    """
    check_state_is_finite(run)
    with _main_process_fails_for_all(run):
        if run.twin is not None or run.accelerator.is_main_process:
            run.writer.save(
                run.step, run.model, run.inner_optimizer, _state_to_save(run),
                probe=None if run.probe is None else run.probe.state_dict(),
                average=None if run.average is None else run.average.module.state_dict(),
            )  # fmt: skip


def wait_until_saved(run: Run) -> None:
    """Wait until the latest checkpoint is on the disk; every process must call this.

    Raises:
        CheckpointError: it could not be written.
        OtherProcessFailed: that happened in the main process.
    """
    with _main_process_fails_for_all(run):
        run.writer.wait()


def _main_process_fails_for_all(run: Run) -> AbstractContextManager[None]:
    """The context in which a failure of the main process is one of all processes.

    Of a sharded model each process has a writer, and these see to it by themselves.
    """
    return nullcontext() if run.twin is not None else failing_together(run.accelerator.device)


def _state_to_save(run: Run) -> dict[str, Any]:
    """A checkpoint's values besides weights, optimiser state, probe and step."""
    scaler = run.accelerator.scaler
    return {
        "settings": asdict(run.args),
        "total_steps": run.total_steps,
        "data": run.fingerprint,
        "seconds": run.seconds,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "precision": run.accelerator.mixed_precision,
        "threads": _cpu_threads(run.accelerator),
        "loss": run.loss_name,
        "ended_by": run.ended_by,
        "prime_sha256": _prime_sha256(run.model),
        "starts": run.starts,
        "labels_sha256": None if run.probe is None else run.probe.labels_sha256,
        "milestone": is_milestone(run),
        "best": run.best,
    }


def _cpu_threads(accelerator: Accelerator) -> int | None:
    """Threads over which torch divides a process's sums on a CPU; None on other devices."""
    return torch.get_num_threads() if accelerator.device.type == "cpu" else None


def _prime_sha256(model: VICRegModel) -> str | None:
    """SHA-256 of the second branch's configuration, with that of its encoder."""
    if model.config.prime is None:
        return None
    text = json.dumps(model.config.prime, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
