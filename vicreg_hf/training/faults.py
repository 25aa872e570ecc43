"""What ends a run, in words that say what to do: numbers not finite, no memory, a lost process."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicreg_hf.checkpoints.reading import CheckpointError, newest_checkpoint
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.step import Step

TERMS = ("loss", "invariance", "variance", "covariance")
MOST_NAMES = 10


class OutOfMemory(RuntimeError):  # noqa: N818
    """No memory for what the settings ask for."""


class ProcessLost(RuntimeError):  # noqa: N818
    """Another process of the run has ended or is silent."""


def check_weights(run: Run) -> None:
    """Before weights are saved; every process must call this.

    Raises:
        FloatingPointError: weights, statistics or optimiser state that are not finite.
    """
    bad = _names_not_finite(_everything(run))
    if run.agree(bool(bad))[0]:
        raise failure(run, f"weights and optimiser state must be finite after step {run.step}",
                      {"step": run.step, "weights": bad})  # fmt: skip


def step_failure(run: Run, step: Step) -> FloatingPointError:
    """The error of a step that must not be taken, with its report."""
    found = describe_step(run, step)
    terms = ", ".join(f"{name} {found[name]}" for name in (*TERMS, "grad_norm"))
    return failure(run, f"loss and gradients must be finite at step {step.number}, got {terms}",
                   found)  # fmt: skip


def describe_step(run: Run, step: Step) -> dict[str, Any]:
    """A step's terms, the norms of its gradients, and the images it saw.

    Of a step that has been taken, as on a GPU, the weights before it are not known any more: None.
    """
    epoch, rows = run.batches.whole_batch(step.number - 1)
    norms = dict(zip(step.names, step.grad_norms.tolist(), strict=True))
    largest = sorted(norms, key=lambda n: norms[n] if math.isfinite(norms[n]) else math.inf)
    taken = run.step >= step.number
    return {
        "step": step.number,
        "epoch": epoch,
        "lr": step.lr,
        **{name: step.output[name].item() for name in TERMS},
        "grad_norm": step.grad_norm.item(),
        "largest_gradients": {name: norms[name] for name in largest[: -MOST_NAMES - 1 : -1]},
        "gradients": [name for name, norm in norms.items() if not math.isfinite(norm)][:MOST_NAMES],
        "weights": None if taken else _names_not_finite(_everything(run)),
        "rows": None if run.args.streaming else rows.tolist(),
    }


def failure(run: Run, sentence: str, found: dict[str, Any]) -> FloatingPointError:
    """Write what was found; the error that says where. Every process must call this."""
    with suppress(Exception):  # a save that failed must not hide what is not finite
        run.writer.wait()
    newest = None
    with suppress(CheckpointError):  # nor must one that cannot be read just now
        newest, _ = newest_checkpoint(run.output_dir / "checkpoints")
    remedies = _remedies(run)
    path = run.output_dir / f"not-finite-step-{found['step']}.json"
    replay = shlex.join(["python", "scripts/pretrain.py", "--output_dir", str(run.output_dir),
                         "--replay", str(found["step"])])  # fmt: skip
    if run.accelerator.is_main_process:
        report = found | {
            "checkpoint": None if newest is None else newest.name,
            "remedies": remedies,
            "replay": replay,
        }
        with suppress(OSError):  # a full disk must not hide what is not finite
            write_report(path, report)
    run.accelerator.wait_for_everyone()  # which may end the main process when they have ended
    kept = f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."
    return FloatingPointError(
        f"{sentence}. {kept} Remedies: {'; '.join(remedies)}. The report is {path}; the step is "
        f"taken again with {replay}."
    )


def write_report(path: Path, found: dict[str, Any]) -> None:
    """As JSON, which has no word for what is not finite."""
    path.write_text(json.dumps(_in_words(found), indent=1) + "\n")


def _in_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_words(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _remedies(run: Run) -> list[str]:
    args = run.args
    remedies = [
        f"lower --base_lr, now {args.base_lr:g}",
        f"lengthen --warmup_epochs, now {args.warmup_epochs:g}",
    ]
    if run.accelerator.mixed_precision == "fp16":
        remedies.insert(0, "use --mixed_precision bf16 instead of fp16")
    return remedies


def _everything(run: Run) -> list[tuple[str, Tensor]]:
    """Weights, statistics and optimiser state by name."""
    state = run.inner_optimizer.state_dict()["state"]
    moments = [
        (f"optimizer.{index}.{name}", value)
        for index, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    ]
    return [*run.model.state_dict().items(), *moments]


def _names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """At most `MOST_NAMES` of them; waits for the device only once where all is well."""
    floating = [(name, x) for name, x in tensors if x.is_floating_point()]
    if not floating:
        return []
    # without squares, which overflow
    norms = [x.abs().amax() if x.numel() else x.new_zeros(()) for _, x in floating]
    finite = torch.isfinite(torch.stack([norm.float().to(norms[0].device) for norm in norms]))
    pairs = zip(floating, finite.tolist(), strict=True)
    return [name for (name, _), fine in pairs if not fine][:MOST_NAMES]


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
        short = (torch.OutOfMemoryError, MemoryError)
        known = (*short, torch.AcceleratorError, torch.distributed.DistError)
        if type(error) is not RuntimeError and not isinstance(error, known):
            raise  # it has words of its own
        if isinstance(error, short) or any(words in text.lower() for words in _SHORT):
            raise OutOfMemory(_no_memory(args, run, text)) from None
        if isinstance(error, torch.distributed.DistError) or any(w in text for w in _LOST):
            raise ProcessLost(
                f"another process of this run has ended or cannot be reached, {_when(run)}; its "
                f"own message says why. The last checkpoint is untouched: "
                f"start again to go on. ({text[:200]})"
            ) from None
        raise


_SHORT = ("allocate memory", "out of memory", "alloc_failed")
"""In lower case: the CPU's allocator, CUDA beside its allocator, and its libraries."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport")


def _when(run: Run | None) -> str:
    return "before the first step" if run is None else f"at step {run.step + 1}"


def _no_memory(args: PretrainingArguments, run: Run | None, text: str) -> str:
    micro = args.micro_batch_size or args.batch_size
    remedies = [f"lower --micro_batch_size, now {micro}, which changes no result but batch "
                "normalisation's statistics"]  # fmt: skip
    if run is not None and run.accelerator.mixed_precision == "no":
        remedies.append("use accelerate launch --mixed_precision bf16")
    remedies.append(f"lower --batch_size, now {args.batch_size}")
    remedies.append(f"narrow --expander_dims, now {args.expander_dims}")
    if args.num_workers:
        remedies.append(f"lower --num_workers, now {args.num_workers}")
    return (
        f"memory ran out {_when(run)}: {text[:200]} Remedies: {'; '.join(remedies)}. "
        "The last checkpoint is untouched."
    )
