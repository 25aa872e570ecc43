"""Taking a step of an earlier run again, to see what happened in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.runtime.distributed import wait_for_all
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.own_parts import OwnParts
from vicreg_hf.training.faults import describe_step, explained, write_report
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients, take_step, views_from_here


def replay(args: PretrainingArguments, step: int, **own: Any) -> Path:
    """Go from the newest earlier checkpoint to a step, and describe it; nothing is trained on.

    Args:
        args: the settings of the run, whose output_dir holds its checkpoints.
        step: number of the step from 1, as in metrics.jsonl and in reports.
        own: the model, train_dataset and loss that `pretrain` was given.

    Returns:
        A JSON file: terms, norms of gradients, what is not finite, and the rows of the images.

    Raises:
        ValueError: not a step of the run.
        CheckpointError: the run has checkpoints, but none from before the step.
    """
    if args.streaming:
        raise ValueError("replay needs data on disk; a stream comes in another order each time.")
    run = setup(replace(args, resume="auto"), before=step, own=OwnParts(**own))
    if not 0 < step <= run.total_steps:
        raise ValueError(f"replay must be a step from 1 to {run.total_steps}, got {step}.")
    saved = {path.name for path in (run.output_dir / "checkpoints").glob("step-*")}
    if run.step == 0 and saved and "step-0" not in saved:
        run.accelerator.print("No checkpoint from before that step is left: it is taken from 0.")
    path = run.output_dir / f"replay-step-{step}.json"
    run.wrapped.train()
    with explained(args, run):
        for views in views_from_here(run, until=step):
            reached = take_gradients(run, views)
            if reached.number == step:
                found = describe_step(run, reached)
                if run.accelerator.is_main_process:
                    write_report(path, found)
                wait_for_all()
                return path
            take_step(run)
    raise CheckpointError(f"step {step} was not reached.")
