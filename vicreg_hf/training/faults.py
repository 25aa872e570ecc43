"""Errors that end a run and say what to do: no finite numbers, no memory, a lost process."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicreg_hf.checkpoints.reading import CheckpointError, newest_checkpoint
from vicreg_hf.data.opening.items import GIVEN
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.distributed import any_process, gather_objects, own_part, wait_for_all
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.step import Step, loss_and_terms

MOST_NAMES = 10
"""Names of tensors in a report at most."""


class OutOfMemory(RuntimeError):  # noqa: N818
    """The settings need more memory than there is."""


class ProcessLost(RuntimeError):  # noqa: N818
    """Another process of the run has ended or is silent."""


def check_state_is_finite(run: Run) -> None:
    """Check weights, statistics and optimiser state before they are saved, in every process.

    Raises:
        FloatingPointError: some of them are not finite.
    """
    names = _not_finite_state(run)
    if any_process([bool(names)], run.accelerator.device)[0]:
        raise _failure(run, f"weights and optimiser state must be finite after step {run.step}",
                       {"step": run.step, "weights": names})  # fmt: skip


def step_failure(run: Run, step: Step) -> FloatingPointError:
    """Write the report of a step that must not be taken; the error to raise, in every process."""
    found = describe_step(run, step)
    terms = ", ".join(f"{name} {found[name]}" for name in (*run.terms, "grad_norm"))
    return _failure(
        run, f"loss and gradients must be finite at step {step.number}, got {terms}", found
    )


def describe_step(run: Run, step: Step) -> dict[str, Any]:
    """A step's terms, the norms of its gradients, and the images it saw.

    Once a step has been taken, as on a GPU, `weights` is None, as those before it are lost.
    """
    epoch, rows = run.batches.whole_batch(step.number - 1)
    norms = dict(zip(step.names, step.grad_norms.tolist(), strict=True))
    largest = sorted(norms, key=lambda n: norms[n] if math.isfinite(norms[n]) else math.inf)
    return {
        "step": step.number,
        "epoch": epoch,
        "lr": step.lr,
        **loss_and_terms(run, step),
        "grad_norm": step.grad_norm.item(),
        "largest_gradients": {name: norms[name] for name in largest[: -MOST_NAMES - 1 : -1]},
        "gradients": [name for name, norm in norms.items() if not math.isfinite(norm)][:MOST_NAMES],
        "weights": None if run.step >= step.number else _not_finite_state(run),
        "rows": None if run.args.streaming else rows.tolist(),
    }


def _failure(run: Run, sentence: str, found: dict[str, Any]) -> FloatingPointError:
    """Write what was found; the error that says where. Every process must call this."""
    args, newest = run.args, None
    with suppress(Exception):  # a save that failed must not hide what is not finite
        run.writer.wait()
    with suppress(CheckpointError):  # nor must one that cannot be read just now
        newest, _ = newest_checkpoint(run.output_dir / "checkpoints")
    remedies = [
        f"lower --base_lr, now {args.base_lr:g}",
        f"lengthen --warmup_epochs, now {args.warmup_epochs:g}",
    ]
    if run.accelerator.mixed_precision == "fp16":
        remedies.insert(0, "use --mixed_precision bf16 instead of fp16")
    replay = shlex.join(["vicreg-hf", "pretrain", "--output_dir", str(run.output_dir),
                         "--replay", str(found["step"])])  # fmt: skip
    if run.loss_name is not None or args.dataset_name.startswith(GIVEN):
        replay = f"vicreg_hf.training.replay.replay(args, {found['step']}, …) and your own parts"
    path = run.output_dir / f"not-finite-step-{found['step']}.json"
    if run.accelerator.is_main_process:
        report = {"checkpoint": newest and newest.name, "remedies": remedies, "replay": replay}
        with suppress(OSError):  # a full disk must not hide what is not finite
            write_report(path, found | report)
    wait_for_all()  # which may end the main process when they have ended
    kept = f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."
    return FloatingPointError(
        f"{sentence}. {kept} Remedies: {'; '.join(remedies)}. The report is {path}; the step is "
        f"taken again with {replay}."
    )


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write JSON, in which numbers that are not finite are strings."""

    def readable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: readable(entry) for key, entry in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(readable(found), indent=1) + "\n")


def _not_finite_state(run: Run) -> list[str]:
    """At most `MOST_NAMES` names of weights, statistics and optimiser state that are not finite."""
    tensors = dict(run.model.state_dict())
    for index, entries in run.inner_optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
    # the largest magnitude, as a sum of squares overflows
    largest = {
        name: x.abs().amax().float().to(run.accelerator.device)
        for name, x in ((name, own_part(x)) for name, x in tensors.items())
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
    }
    finite = torch.isfinite(torch.stack(list(largest.values()))).tolist()  # waits only once
    names = [name for name, fine in zip(largest, finite, strict=True) if not fine]
    if run.twin is not None:
        names = list(dict.fromkeys(gather_objects(names)))
    return names[:MOST_NAMES]


@contextmanager
def explained(args: PretrainingArguments, run: Run | None = None) -> Iterator[None]:
    """Say in a sentence what torch raises when memory is short or another process has ended.

    Args:
        run: None while it is being set up.

    Raises:
        OutOfMemory: instead of torch's own errors.
        ProcessLost: likewise.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = one_line(error)
        out_of_memory = (torch.OutOfMemoryError, MemoryError)
        known = (*out_of_memory, torch.AcceleratorError, torch.distributed.DistError)
        if type(error) is not RuntimeError and not isinstance(error, known):
            raise  # it explains itself
        when = "before the first step" if run is None else f"at step {run.step + 1}"
        if isinstance(error, out_of_memory) or any(w in text.lower() for w in _OUT_OF_MEMORY):
            micro = args.micro_batch_size or args.batch_size
            remedies = [f"lower --micro_batch_size, now {micro}, which changes no result but batch "
                        "normalisation's statistics"]  # fmt: skip
            if run is not None and run.accelerator.mixed_precision == "no":
                remedies.append("use accelerate launch --mixed_precision bf16")
            remedies.append(f"lower --batch_size, now {args.batch_size}")
            remedies.append(f"narrow --expander_dims, now {args.expander_dims}")
            if args.num_workers:
                remedies.append(f"lower --num_workers, now {args.num_workers}")
            raise OutOfMemory(
                f"memory ran out {when}: {text[:200]} Remedies: {'; '.join(remedies)}. "
                "The last checkpoint is untouched."
            ) from None
        if isinstance(error, torch.distributed.DistError) or any(w in text for w in _LOST):
            raise ProcessLost(
                f"another process of this run has ended or cannot be reached, {when}; its "
                f"own message says why. The last checkpoint is untouched: "
                f"start again to go on. ({text[:200]})"
            ) from None
        raise


_OUT_OF_MEMORY = ("allocate memory", "out of memory", "alloc_failed")
"""Lower-case words of the CPU's allocator, of CUDA beside its allocator, and of its libraries."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")
