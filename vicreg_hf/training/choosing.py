"""Which step of a run is published: the last one, or the best of those that were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vicreg_hf.checkpoints.reading import (
    PREFIX,
    BestStep,
    CheckpointError,
    find_damage,
    load_weights,
)
from vicreg_hf.runtime.distributed import any_process
from vicreg_hf.settings.pretraining import MEASURES
from vicreg_hf.training.run import Run


def is_milestone(run: Run) -> bool:
    """Whether the step that the run has reached is kept for good."""
    every = run.args.keep_every
    return every is not None and run.step > 0 and run.step % every == 0


def remember_best(run: Run, row: Mapping[str, Any]) -> bool:
    """Remember a step that was just measured if it is the best so far, and say whether it is.

    The first of several that are equal stays the best. Every process must call this.

    Args:
        row: of metrics.jsonl; only that of the main process has measurements.
    """
    if run.args.keep_best == "none":
        return False
    measure, found = MEASURES[run.args.keep_best], False
    if run.accelerator.is_main_process:
        value = sum(row.get(column, math.nan) for column in measure.columns)
        best = -math.inf if run.best is None else measure.sign * run.best["value"]
        found = math.isfinite(value) and measure.sign * value > best
        if found:
            run.best = BestStep(
                measure=run.args.keep_best, step=run.step, value=value, images=_images(run)
            )
    return any_process([found], run.accelerator.device)[0]


def resume_best(run: Run, best: BestStep | None) -> None:
    """Go on with the best step so far, as the checkpoint says that the run resumes from.

    Raises:
        CheckpointError: the run has ended and its best checkpoint is not whole.
    """
    if best is None or run.args.keep_best == "none":
        return
    say = run.accelerator.print
    if (best["measure"], best["images"]) != (run.args.keep_best, _images(run)):
        say(f"The best step is chosen anew: step {best['step']} was measured otherwise.")
        return
    path = run.writer.folder / f"{PREFIX}{best['step']}"
    damage = find_damage(path)
    if damage is None:
        run.best = best
        return
    if run.step == run.total_steps:
        raise CheckpointError(
            f"the best checkpoint of a run that has ended must be whole, and {path} is not "
            f"({damage}). Put it back, choose another output_dir, or --resume never to start over."
        )
    say(f"warning: checkpoint {path} is damaged ({damage}), so the best step is chosen anew.")


def load_chosen(run: Run) -> None:
    """Put the weights of the best step into the published model, where the run keeps it.

    Raises:
        CheckpointError: they cannot be read.
    """
    if chosen_step(run) != run.step:
        path = run.writer.folder / f"{PREFIX}{chosen_step(run)}"
        load_weights(path, run.published, averaged=run.average is not None)


def chosen_step(run: Run) -> int:
    """The step whose weights are published."""
    return run.step if run.best is None else run.best["step"]


def describe_choice(run: Run) -> str | None:
    """A phrase that says which step's weights are published and why; None for a run's last."""
    if run.args.keep_best == "none":
        return None
    measure, best = MEASURES[run.args.keep_best], run.best
    if best is None:
        return f"those of the last step, as no step has a known {measure.words}"
    value = f"{best['value']:.4g}"
    if measure.labelled:
        value = f"{100 * best['value']:.1f} %"
    end = "highest" if measure.sign > 0 else "lowest"
    before = ", which is before training," if best["step"] == 0 else ""
    return (
        f"those of step {best['step']:,} of {run.total_steps:,}{before} with the {end} "
        f"{measure.words}: {value} ({best['images']}; --keep_best {best['measure']})"
    )


def _images(run: Run) -> str:
    """The images that the measure is of, by which it is told whether two can be compared."""
    averaged = "" if run.average is None else ", by the moving average"
    if MEASURES[run.args.keep_best].labelled:
        return ("" if run.monitor is None else run.monitor.subject) + averaged
    return f"a fixed sample of {run.inputs.train.name}{averaged}"
