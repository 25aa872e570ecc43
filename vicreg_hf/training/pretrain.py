"""The one training loop: setup, fit, finish.

Everything that changes during a run is in the model, the optimiser, the probe if there is one, and
the step number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
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
from vicreg_hf.metrics.collapse import alignment, effective_rank, embedding_std, uniformity
from vicreg_hf.runtime.distributed import OtherProcessFailed, failing_together, gather_rows
from vicreg_hf.runtime.liveness import watched
from vicreg_hf.runtime.output_dir import claim
from vicreg_hf.runtime.signals import Signals, Stopped, name_of
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.faults import (
    TERMS,
    OutOfMemory,
    ProcessLost,
    check_weights,
    explained,
    step_failure,
)
from vicreg_hf.training.finish import finish
from vicreg_hf.training.monitoring.collapse import CollapseWatch
from vicreg_hf.training.monitoring.log import Clock
from vicreg_hf.training.resuming import state_of
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import make_output_dir, setup
from vicreg_hf.training.step import Step, Verdicts, take_gradients, take_step, views_from_here

ERRORS = (
    ValueError, OSError, SafetensorError, CheckpointError, FloatingPointError, LoadingError,
    HubError, ExportError, OutOfMemory, ProcessLost, OtherProcessFailed,
)  # fmt: skip
"""What ends a run with a sentence that says why."""
RUN_AHEAD = 10
"""While a checkpoint is written, training goes on for this part of `save_steps`, and then waits:
a crash costs at most so much more than `save_steps`."""


def pretrain(args: PretrainingArguments) -> Path:
    """Pretrain as the settings say, resuming from the newest checkpoint in output_dir.

    Returns:
        The directory of the published encoder.

    Raises:
        ValueError: a setting that cannot be, before any training.
        CheckpointError: resuming was required and nothing valid is there, or the checkpoint is of
            another run, or one could not be written.
        Stopped: SIGTERM, SIGINT, SIGUSR1 or SIGHUP came; what was reached is saved.
        FloatingPointError: the loss, a gradient or a weight is not finite.
        OutOfMemory: a step needs more memory than there is.
        ProcessLost: another process of the run has ended.
        ImageError: too many images cannot be used.
        LoadingError: a loading worker died.
        ExportError: the backbone could not be published, before any training.
        HubError: the encoder cannot be pushed, before any training; or could not be, after it.
    """
    if not isinstance(args, PretrainingArguments):
        raise ValueError(
            f"args must be PretrainingArguments, got {args!r}; "
            'PretrainingArguments.from_recipe("demo") makes those of a recipe.'
        )
    with Signals() as signals, claim(Path(str(args.output_dir))):
        with explained(args):
            run = setup(args)
            with failing_together(run.accelerator.device):
                make_output_dir(run)
        # torch may say anywhere that a worker has died
        with explained(args, run), watched(run.accelerator), loading_errors():
            _agree_on_bad_images(run)
            measure(run, signals)
            fit(run, signals)
            directory, fault = finish(run)
        if fault is not None:
            raise fault
        return directory


def fit(run: Run, signals: Signals) -> None:
    """Train from the run's step to its last."""
    with closing(views_from_here(run)) as views, _convolutions_tried_out(run):
        _take_steps(run, signals, views)
    settle(run)


@contextmanager
def _convolutions_tried_out(run: Run) -> Iterator[None]:
    """On a GPU take the fastest algorithm for each shape, as the authors' code does."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or run.accelerator.device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _take_steps(run: Run, signals: Signals, steps: Iterable[tuple[Any, ...]]) -> None:
    args = run.args
    bar = tqdm(
        steps, "pretraining", run.total_steps, initial=run.step, unit="step",
        disable=not run.accelerator.is_local_main_process,
    )  # fmt: skip
    run.wrapped.train()
    clock = Clock(args.num_views * args.batch_size)
    watch = CollapseWatch(args, run.batches.steps_per_epoch, run.log.rows())
    verdicts = Verdicts(run)
    for views in bar:
        step = take_gradients(run, views)
        verdicts.ask(step, stopping=signals.received is not None)
        bad, stopping, unsaved = verdicts.read(everything=_is_kept(run, step.number))
        if bad is not None:
            raise step_failure(run, bad)
        if unsaved:
            settle(run)
        if run.probe is not None:
            assert step.output.pooler_output is not None
            run.probe.learn(step.output.pooler_output, run.batches.batch(run.step)[1])
        take_step(run)
        clock.tick()
        last = run.step == run.total_steps
        if run.step % args.logging_steps == 0 or last:
            row = _metrics(run, step, clock)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if last or (args.knn_steps and run.step % args.knn_steps == 0):
                row |= _accuracies(run, None if last else signals)
            run.log.add(row)
            run.warn(watch.look(row))
            clock.restart()
        elif args.knn_steps and run.step % args.knn_steps == 0:
            run.log.add(_place(run) | _accuracies(run, signals))
            clock.restart()
        if run.step % args.save_steps == 0 or last or stopping:
            save(run)
            clock.restart()
        if run.step % args.save_steps == args.save_steps // RUN_AHEAD:
            settle(run)
        if stopping and not last:
            stop(run, signals)


def _is_kept(run: Run, number: int) -> bool:
    """Whether something of a step will be logged or saved."""
    args = run.args
    every = (args.logging_steps, args.save_steps, args.knn_steps)
    return number == run.total_steps or any(number % steps == 0 for steps in every if steps)


def _agree_on_bad_images(run: Run) -> None:
    """Every process learns what all have found, and stops if it is too much."""
    images = run.inputs.images
    seen = len(images) if isinstance(images, Tensor) else run.step * run.args.batch_size
    run.inputs.bad.agree(
        gather_object, seen=seen,
        write=run.accelerator.is_main_process, say=run.accelerator.print,
    )  # fmt: skip
    if run.probe is not None:
        run.probe.leave_out(image.row for image in run.inputs.bad.found)


def measure(run: Run, signals: Signals) -> None:
    """Before the first step: kNN accuracy of the pixels and of the untrained encoder.

    Raises:
        Stopped: it was given up; the next session, which begins at step 0 too, measures it.
    """
    if run.step == 0 and run.monitor is not None:
        accuracies = _accuracies(run, signals)
        if accuracies:
            pixels = run.monitor.pixels(run.accelerator.device)
            more = {} if pixels is None else {"knn_pixels": pixels}
            run.log.add(_place(run) | accuracies | more)
        if run.agree(run.accelerator.is_main_process and not accuracies)[0]:
            save(run)
            stop(run, signals)


def save(run: Run) -> None:
    """Begin to write a checkpoint, unless the weights are not finite."""
    check_weights(run)
    fault: Exception | None = None
    if run.accelerator.is_main_process:
        try:
            run.writer.save(
                run.step, run.model, run.inner_optimizer, state_of(run),
                probe=None if run.probe is None else run.probe.state_dict(),
            )  # fmt: skip
        except Exception as error:  # of the one before
            fault = error
    _fail_together(run, fault)


def settle(run: Run) -> None:
    """Wait until what was saved is on the disk.

    Raises:
        CheckpointError: it could not be written; in every process.
    """
    fault: Exception | None = None
    try:
        run.writer.wait()
    except Exception as error:  # whatever it is, all processes end
        fault = error
    _fail_together(run, fault)


def _fail_together(run: Run, fault: Exception | None) -> None:
    if run.agree(fault is not None)[0]:
        raise fault or CheckpointError(
            "a checkpoint could not be written; the main process says why."
        )


def stop(run: Run, signals: Signals) -> None:
    """End a run that was asked to, when it is saved."""
    settle(run)
    signals.settled = True
    reason = "another process" if signals.received is None else name_of(signals.received)
    raise Stopped(
        f"Stopped by {reason} after step {run.step} of {run.total_steps}, which is saved in "
        f"{run.writer.folder}. Started again with the same settings, the run goes on."
    )


def _place(run: Run) -> dict[str, Any]:
    return {"step": run.step, "epoch": run.step / run.batches.steps_per_epoch}


def _metrics(run: Run, step: Step, clock: Clock) -> dict[str, Any]:
    rate, output = clock.rate(), step.output
    assert output.embeddings is not None
    _agree_on_bad_images(run)
    z, z_prime = (gather_rows(branch.detach()) for branch in output.embeddings[:2])
    more = {} if run.probe is None else {"probe_loss": run.probe.loss.item()}
    if run.model.prime is not None:  # it may collapse by itself
        more |= {
            "embedding_std_prime": embedding_std(z_prime).item(),
            "effective_rank_prime": effective_rank(z_prime).item(),
        }
    return (
        _place(run)
        | {
            **{name: output[name].item() for name in TERMS},
            "grad_norm": step.grad_norm.item(),
            "lr": step.lr,
            "views_per_second": round(rate, 1),
            "embedding_std": embedding_std(z).item(),
            "effective_rank": effective_rank(z).item(),
            "alignment": alignment(z, z_prime).item(),
            "uniformity": uniformity(z).item(),
            "bad_images": len(run.inputs.bad),
        }
        | more
    )


def _accuracies(run: Run, signals: Signals | None) -> dict[str, float | str]:
    """Of kNN and probe, measured by the main process while the others wait.

    Args:
        signals: one of which ends it without a result, as it may take minutes.
    """
    row = {}
    if run.monitor is not None and run.accelerator.is_main_process:
        classify = run.probe.predict if run.probe is not None and run.probe.has_learned else None
        with suppress(_Abandoned):
            row = run.monitor.measure(
                run.model.encoder, run.accelerator.device, classify,
                autocast=partial(_encoding, run, signals),
            ) | {"knn_images": run.monitor.subject}  # fmt: skip
    run.accelerator.wait_for_everyone()
    return row


class _Abandoned(Exception):  # noqa: N818
    """The run was asked to stop while it measured."""


@contextmanager
def _encoding(run: Run, signals: Signals | None) -> Iterator[None]:
    """For one batch that is measured."""
    if signals is not None and signals.received is not None:
        raise _Abandoned
    with run.accelerator.autocast():
        yield
