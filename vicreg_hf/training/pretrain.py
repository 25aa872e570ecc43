"""The training loop: set up, fit, finish.

Everything that changes during a run is in the model, the optimiser, the probe if there is one, and
the step number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.data.workers import LoadingError, loading_errors
from vicreg_hf.hub.api import HubError
from vicreg_hf.hub.export import ExportError
from vicreg_hf.metrics.collapse import alignment, effective_rank, mean_std, uniformity
from vicreg_hf.runtime.distributed import (
    OtherProcessFailed,
    any_process,
    failing_together,
    gather_rows,
)
from vicreg_hf.runtime.liveness import watched
from vicreg_hf.runtime.output_dir import claim
from vicreg_hf.runtime.signals import Signals, Stopped, StoppedWaiting, name_of
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.faults import TERMS, OutOfMemory, ProcessLost, explained, step_failure
from vicreg_hf.training.finish import finish_run
from vicreg_hf.training.monitoring.collapse import CollapseWatch
from vicreg_hf.training.monitoring.log import Clock
from vicreg_hf.training.monitoring.trackers import check_installed
from vicreg_hf.training.resuming import save, wait_until_saved
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import make_output_dir, setup
from vicreg_hf.training.step import Step, StepChecks, take_gradients, take_step, views_from_here

ERRORS = (
    ValueError, OSError, SafetensorError, CheckpointError, FloatingPointError, LoadingError,
    HubError, ExportError, OutOfMemory, ProcessLost, OtherProcessFailed,
)  # fmt: skip
"""Errors that end a run with a sentence that says why."""
RUN_AHEAD = 10
"""Training goes on for a tenth of `save_steps` while a checkpoint is written, and then waits, so
that a crash never costs more than 1.1 times `save_steps`."""


def pretrain(args: PretrainingArguments) -> Path:
    """Pretrain as the settings say, resuming from the newest checkpoint in output_dir.

    Returns:
        The directory of the published encoder.

    Raises:
        ValueError: a setting is invalid; raised before any training.
        CheckpointError: resuming was required and there is no valid checkpoint, or it belongs to
            another run, or one could not be written.
        Stopped: SIGTERM, SIGINT, SIGUSR1 or SIGHUP came; the steps taken are saved.
        FloatingPointError: the loss, a gradient or a weight is not finite.
        OutOfMemory: a step needs more memory than there is.
        ProcessLost: another process of the run has ended.
        ImageError: too many images cannot be used.
        LoadingError: a loading worker died.
        ExportError: the backbone could not be published, before any training.
        HubError: the encoder cannot be pushed, as seen before any training or after it.
    """
    if not isinstance(args, PretrainingArguments):
        raise ValueError(
            f"args must be PretrainingArguments, got {args!r}; "
            'PretrainingArguments.from_recipe("demo") makes those of a recipe.'
        )
    with Signals() as signals, claim(Path(str(args.output_dir))):
        with explained(args):
            check_installed(args.trackers)
            run = setup(args)
            with failing_together(run.accelerator.device):
                make_output_dir(run)
                if run.accelerator.is_main_process:
                    run.trackers.start(run.log, asdict(run.args), step=run.step)
        # loading_errors, as any call of torch may report that a worker has died
        with explained(args, run), watched(run.accelerator), loading_errors(), run.trackers:
            share_bad_images(run)
            measure_untrained(run, signals)
            fit(run, signals)
            directory, fault = finish_run(run)
        if fault is not None:
            raise fault
        return directory


def fit(run: Run, signals: Signals) -> None:
    """Train from the run's step to its last."""
    args = run.args
    clock = Clock(args.num_views * args.batch_size)
    watch = CollapseWatch(args, run.batches.steps_per_epoch, run.log.rows())
    checks = StepChecks(run)
    run.wrapped.train()
    with (
        _saved_if_stopped_waiting(run, signals),
        closing(views_from_here(run)) as batches,
        _fastest_convolutions(run.accelerator.device),
    ):
        for views in run.progress.bar(batches, step=run.step):
            step = take_gradients(run, views)
            last = step.number == run.total_steps
            logs, saves, measures = (
                last or (bool(every) and step.number % every == 0)
                for every in (args.logging_steps, args.save_steps, args.knn_steps)
            )
            checks.start(step, stopping=signals.received is not None)
            bad_step, stopping, save_failed = checks.collect(
                include_latest=logs or saves or measures
            )
            if bad_step is not None:
                raise step_failure(run, bad_step)
            if save_failed:
                wait_until_saved(run)  # which raises
            if run.probe is not None:
                assert step.output.pooler_output is not None
                run.probe.learn(step.output.pooler_output, run.batches.batch(run.step)[1])
            take_step(run)
            clock.tick()
            run.progress.tick(run.step)
            if logs or measures:
                row = _metrics(run, step, clock) if logs else _step_and_epoch(run)
                if measures:
                    row |= _accuracies(run, None if last else signals)
                run.log.add(row)
                if (warning := watch.warning_for(row)) and run.accelerator.is_main_process:
                    tqdm.write(f"warning: {warning}", file=sys.stderr)
            if saves or stopping:
                save(run)
            if logs or measures or saves or stopping:
                clock.restart()
            if run.step % args.save_steps == args.save_steps // RUN_AHEAD:
                wait_until_saved(run)
            if stopping and not last:
                stop(run, signals)
    wait_until_saved(run)


@contextmanager
def _saved_if_stopped_waiting(run: Run, signals: Signals) -> Iterator[None]:
    """Save a run that is asked to stop while no data come."""
    try:
        yield
    except StoppedWaiting:
        save(run)
        stop(run, signals)


@contextmanager
def _fastest_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, try the algorithms and take the fastest for each shape, as the authors' code."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def stop(run: Run, signals: Signals) -> None:
    """End a run that was asked to stop and has been saved.

    Raises:
        Stopped: always.
    """
    wait_until_saved(run)
    signals.settled = True
    reason = "another process" if signals.received is None else name_of(signals.received)
    raise Stopped(
        f"Stopped by {reason} after step {run.step} of {run.total_steps}, which is saved in "
        f"{run.writer.folder}. Started again with the same settings, the run goes on."
    )


def share_bad_images(run: Run) -> None:
    """Tell every process which images cannot be used.

    Raises:
        ImageError: they are too many.
    """
    images = run.inputs.images
    seen = len(images) if isinstance(images, Tensor) else run.step * run.args.batch_size
    run.inputs.bad.agree(
        gather_object, seen=seen,
        write=run.accelerator.is_main_process, say=run.accelerator.print,
    )  # fmt: skip
    if run.probe is not None:
        run.probe.leave_out(image.row for image in run.inputs.bad.found)


def measure_untrained(run: Run, signals: Signals) -> None:
    """Log the kNN accuracy of the pixels and of the untrained encoder, before the first step.

    Raises:
        Stopped: a signal came first; the next session, which begins at step 0 too, measures it.
    """
    if run.step > 0 or run.monitor is None:
        return
    row = _accuracies(run, signals)
    if row:
        pixels = run.monitor.pixels(run.accelerator.device)
        run.log.add(_step_and_epoch(run) | row | ({} if pixels is None else {"knn_pixels": pixels}))
    stopped = run.accelerator.is_main_process and not row
    if any_process([stopped], run.accelerator.device)[0]:
        save(run)
        stop(run, signals)


def _step_and_epoch(run: Run) -> dict[str, Any]:
    return {"step": run.step, "epoch": run.step / run.batches.steps_per_epoch}


def _metrics(run: Run, step: Step, clock: Clock) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    rate, output = clock.rate(), step.output
    assert output.embeddings is not None
    share_bad_images(run)
    z, z_prime = (gather_rows(branch.detach()) for branch in output.embeddings[:2])
    row = _step_and_epoch(run) | {
        **{name: output[name].item() for name in TERMS},
        "grad_norm": step.grad_norm.item(),
        "lr": step.lr,
        "views_per_second": round(rate, 1),
        "embedding_std": mean_std(z).item(),
        "effective_rank": effective_rank(z).item(),
        "alignment": alignment(z, z_prime).item(),
        "uniformity": uniformity(z).item(),
        "bad_images": len(run.inputs.bad),
    }
    if run.probe is not None:
        row["probe_loss"] = run.probe.loss.item()
    if run.model.prime is not None:  # it may collapse by itself
        row["embedding_std_prime"] = mean_std(z_prime).item()
        row["effective_rank_prime"] = effective_rank(z_prime).item()
    return row


def _accuracies(run: Run, signals: Signals | None) -> dict[str, Any]:
    """Accuracies of kNN and probe, which the main process measures while the others wait.

    Args:
        signals: a request to stop ends the measurement, which may take minutes, with no result.
    """
    row: dict[str, Any] = {}
    if run.monitor is not None and run.accelerator.is_main_process:
        classify = run.probe.predict if run.probe is not None and run.probe.steps > 0 else None
        with suppress(Stopped), run.progress.measuring():
            row = run.monitor.measure(
                run.model.encoder, run.accelerator.device, classify,
                autocast=partial(_autocast_unless_stopped, run, signals),
            ) | {"knn_images": run.monitor.subject}  # fmt: skip
    run.accelerator.wait_for_everyone()
    return row


@contextmanager
def _autocast_unless_stopped(run: Run, signals: Signals | None) -> Iterator[None]:
    """The context in which the monitor encodes one batch."""
    if signals is not None and signals.received is not None:
        raise Stopped("The measurement was not finished.")
    with run.accelerator.autocast():
        yield
