"""The training loop: set up, fit, finish.

Everything that changes during a run is in the model, the optimiser, the average of weights and the
probe if there are such, and the step number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.data.workers import LoadingError, loading_errors
from vicreg_hf.hub.api import HubError
from vicreg_hf.hub.export import ExportError
from vicreg_hf.loss.own import Loss
from vicreg_hf.metrics.collapse import alignment, effective_rank, mean_std, uniformity
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.distributed import (
    OtherProcessFailed,
    any_process,
    failing_together,
    gather_objects,
    gather_rows,
    wait_for_all,
)
from vicreg_hf.runtime.liveness import watched
from vicreg_hf.runtime.output_dir import check_shared, claim
from vicreg_hf.runtime.signals import Signals, Stopped, StoppedWaiting, name_of
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.own_parts import OwnParts
from vicreg_hf.training.callbacks import Callback, Callbacks, check_callbacks, check_same_callbacks
from vicreg_hf.training.choosing import remember_best
from vicreg_hf.training.faults import OutOfMemory, ProcessLost, explained, step_failure
from vicreg_hf.training.finish import finish_run
from vicreg_hf.training.monitoring.collapse import CollapseWatch
from vicreg_hf.training.monitoring.log import Clock
from vicreg_hf.training.monitoring.trackers import check_installed
from vicreg_hf.training.resuming import save, wait_until_saved
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import make_output_dir, setup
from vicreg_hf.training.step import (
    Step,
    StepChecks,
    loss_and_terms,
    representations,
    take_gradients,
    take_step,
    views_from_here,
)

ERRORS = (
    ValueError, OSError, SafetensorError, CheckpointError, FloatingPointError, LoadingError,
    HubError, ExportError, OutOfMemory, ProcessLost, OtherProcessFailed,
)  # fmt: skip
"""Errors that end a run with a sentence that says why."""
RUN_AHEAD = 10
"""Training goes on for a tenth of `save_steps` while a checkpoint is written, and then waits, so
that a crash never costs more than 1.1 times `save_steps`."""


def pretrain(
    args: PretrainingArguments,
    *,
    model: VICRegModel | None = None,
    train_dataset: Any = None,
    loss: Loss | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Pretrain as the settings say, resuming from the newest checkpoint in output_dir.

    Args:
        model: trained itself, from its own weights; its architecture and expander are the run's.
        train_dataset: a map-style torch `Dataset` of images of PIL or tensors (C, H, W), uint8 or
            float, or of tuples or dicts that hold one and perhaps a label; or a `datasets.Dataset`.
        loss: in place of VICReg's, from two (n, D) embeddings of this process to a scalar tensor,
            or to named scalars with "loss"; `gather_with_gradient` gives the rows of all processes.
        callbacks: called in every process while the run goes on.

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
    own, callbacks = OwnParts(model, train_dataset, loss), check_callbacks(callbacks)
    args = own.fill_in(args)  # which settles output_dir
    with Signals() as signals, claim(Path(str(args.output_dir))):
        with explained(args):
            check_installed(args.trackers)
            run = setup(args, own=own)
            check_same_callbacks(callbacks)
            run.callbacks = callbacks
            with failing_together(run.accelerator.device):
                make_output_dir(run)
                if run.accelerator.is_main_process:
                    shown = asdict(run.args)
                    shown |= {k: v["name"] for k, v in run.starts.items() if shown.get(k)}
                    run.trackers.start(run.log, shown, step=run.step)
            if run.twin is not None:  # every process writes a part of each checkpoint
                check_shared(run.writer.folder)
        # loading_errors, as any call of torch may report that a worker has died
        with (
            explained(args, run), watched(run.accelerator, run.timer), loading_errors(),
            run.trackers,
        ):  # fmt: skip
            share_bad_images(run)
            measure_untrained(run, signals)
            fit(run, signals)
            directory, fault = finish_run(run)
            Callbacks(run).on_end(directory)
        if fault is not None:
            raise fault
        return directory


def fit(run: Run, signals: Signals) -> None:
    """Train from the run's step to its last, or until a callback ends it."""
    args = run.args
    clock = Clock(args.num_views * args.batch_size)
    watch = CollapseWatch(args, run.batches.steps_per_epoch, run.log.rows())
    checks, callbacks = StepChecks(run), Callbacks(run)
    ahead = args.save_steps // RUN_AHEAD
    waits_at: int | None = run.step + ahead  # a checkpoint may have been begun at this step
    run.wrapped.train()
    with (
        _saved_if_stopped_waiting(run, signals),
        closing(views_from_here(run)) as batches,
        _fastest_convolutions(run.accelerator.device),
    ):
        for views in run.progress.bar(batches, step=run.step):
            run.timer.begin(run.step + 1)
            step = take_gradients(run, views)
            last = step.number == run.total_steps
            logs, saves, keeps, measures = (
                last or (bool(every) and step.number % every == 0)
                for every in (args.logging_steps, args.save_steps, args.keep_every, args.knn_steps)
            )
            saves = saves or keeps
            checks.start(step, stopping=signals.received is not None)
            bad_step, stopping, save_failed = checks.collect(
                include_latest=logs or saves or measures
            )
            if bad_step is not None:
                raise step_failure(run, bad_step)
            if save_failed:
                wait_until_saved(run)  # which raises
            if run.probe is not None:
                y = representations(run, step, views)
                run.probe.learn(y, run.batches.batch(run.step)[1])
            take_step(run)
            run.timer.end()
            clock.tick()
            run.progress.tick(run.step)
            callbacks.on_step(step)
            if logs or measures:
                row = _metrics(run, step, clock) if logs else _step_and_epoch(run)
                if measures:
                    found = _measurements(run, None if last else signals)
                    stopping = _was_cut_short(run, found) or stopping
                    row |= found
                run.log.add(row)
                callbacks.on_log(row)
                if (warning := watch.warning_for(row)) and run.accelerator.is_main_process:
                    tqdm.write(f"warning: {warning}", file=sys.stderr)
                saves = (measures and remember_best(run, row)) or saves
            ended = callbacks.settle()
            if ended and not measures:
                measure_end(run)
            if saves or stopping or ended:
                save(run)
                waits_at = run.step + ahead
                callbacks.on_save()
            if ended:
                break
            if logs or measures or saves or stopping:
                clock.restart()
            if waits_at is not None and run.step >= waits_at:
                waits_at = None
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
        gather_objects, seen=seen,
        write=run.accelerator.is_main_process, say=run.accelerator.print,
    )  # fmt: skip
    if run.probe is not None:
        run.probe.leave_out(image.row for image in run.inputs.bad.found)


def measure_untrained(run: Run, signals: Signals) -> None:
    """Measure the untrained encoder, and the pixels by kNN, before the first step.

    Raises:
        Stopped: a signal came first; the next session, which begins at step 0 too, measures it.
    """
    if run.step > 0:
        _measure_what_was_cut_short(run, signals)
        return
    row = _measurements(run, signals, may_stop=True)
    if _was_cut_short(run, row):
        save(run)
        stop(run, signals)
    pixels = None if run.monitor is None else run.monitor.pixels(run.accelerator.device)
    run.log.add(_step_and_epoch(run) | row | ({} if pixels is None else {"knn_pixels": pixels}))
    if remember_best(run, row):
        save(run)


def _measure_what_was_cut_short(run: Run, signals: Signals) -> None:
    """Measure the step that a run goes on from, if a stop has ended its measurement.

    Raises:
        Stopped: another one does so too.
    """
    every = run.args.knn_steps
    if not every or run.step % every or run.step == run.total_steps:
        return
    last = run.log.rows()[-1:] if run.accelerator.is_main_process else []
    cut = any(row["step"] == run.step and "sample_effective_rank" not in row for row in last)
    if not any_process([cut], run.accelerator.device)[0]:
        return
    row = _measurements(run, signals, may_stop=True)
    if _was_cut_short(run, row):
        stop(run, signals)
    run.log.amend(_step_and_epoch(run) | row)


def _was_cut_short(run: Run, found: dict[str, Any]) -> bool:
    """Whether a stop has ended a measurement, which then has no result in the main process."""
    cut = run.accelerator.is_main_process and not found
    return any_process([cut], run.accelerator.device)[0]


def measure_end(run: Run) -> None:
    """Measure the step after which a callback ends the run."""
    if row := _measurements(run, None):
        run.log.amend(_step_and_epoch(run) | row)
    remember_best(run, row)


def _step_and_epoch(run: Run) -> dict[str, Any]:
    return {"step": run.step, "epoch": run.step / run.batches.steps_per_epoch}


def _metrics(run: Run, step: Step, clock: Clock) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    rate, output = clock.rate(), step.output
    assert output.embeddings is not None
    share_bad_images(run)
    z, z_prime = (gather_rows(branch.detach()) for branch in output.embeddings[:2])
    row = _step_and_epoch(run) | {
        **loss_and_terms(run, step),
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


def _measurements(
    run: Run, signals: Signals | None, *, may_stop: bool | None = None
) -> dict[str, Any]:
    """The encoder with labels, measured by all processes, and without, by the main one.

    Only that one has the result.

    Args:
        signals: a request to stop ends the measurement, which may take minutes, with no result.
        may_stop: whether it does so; by default not where the measurement decides which step is
            kept, which a stop must not change.
    """
    row: dict[str, Any] = {}
    if may_stop is None:
        may_stop = run.args.keep_best == "none"
    if run.sample is not None:
        classify = run.probe.predict if run.probe is not None and run.probe.steps > 0 else None
        autocast = partial(_autocast_unless_stopped, run, signals if may_stop else None)
        device = run.accelerator.device
        with run.whole_weights(), suppress(Stopped), run.progress.measuring():
            found: dict[str, Any] = {}
            if run.monitor is not None:
                found |= run.monitor.measure(
                    run.published.encoder, device, classify, autocast=autocast
                ) | {"knn_images": run.monitor.subject}
            if run.accelerator.is_main_process:
                row = found | run.sample.measure(run.published, device, autocast=autocast)
    wait_for_all()
    return row


@contextmanager
def _autocast_unless_stopped(run: Run, signals: Signals | None) -> Iterator[None]:
    """The context in which the monitor encodes one batch."""
    if signals is not None and signals.received is not None:
        raise Stopped("The measurement was not finished.")
    with run.accelerator.autocast():
        yield
