"""Code of one's own that is called while a run goes on, and can neither change nor hang it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicreg_hf.runtime.distributed import OtherProcessFailed, agree, gather_objects
from vicreg_hf.training.resuming import save, wait_until_saved
from vicreg_hf.training.run import Run
from vicreg_hf.training.step import Step


class Callback:
    """Methods that a run calls in every process; each does nothing unless a class replaces it.

    `run.accelerator.is_main_process` tells the process that writes. A callback may read everything
    of the run, and change its own attributes alone; these are not saved, so what a resumed run must
    remember is read from `run.log.rows()`. What it draws from the global random generators, and
    gradients and modes of modules that it leaves, are undone. `run.request_stop(reason)` ends the
    run, with encoder and card, once all that the present step asks for is logged and saved.

    An exception ends the run in all processes, after the steps taken are saved. It must not wait
    for other processes in a method where another may raise.
    """

    def on_step(self, run: Run, step: Step) -> None:
        """Called after each step.

        Args:
            step: its `number` counts from 1; its output and gradient norms are on the device.
        """

    def on_log(self, run: Run, row: dict[str, Any]) -> None:
        """Called after a row of metrics.jsonl is written.

        Args:
            row: a copy of it. Accuracies are measured, and so there, in the main process alone.
        """

    def on_save(self, run: Run, checkpoint: Path) -> None:
        """Called after a checkpoint is whole on the disk.

        A stop that it asks for comes after the next step.

        Args:
            checkpoint: its directory; the newest two are kept.
        """

    def on_end(self, run: Run, encoder: Path) -> None:
        """Called once encoder and card are written.

        Args:
            encoder: its directory.
        """


class Callbacks:
    """Calls the callbacks of a run, and agrees over processes on what they ask for.

    Every process must make the same calls.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.callbacks = run, run.callbacks
        self._fault: Exception | None = None

    def on_step(self, step: Step) -> None:
        self._call("on_step", step)

    def on_log(self, row: dict[str, Any]) -> None:
        self._call("on_log", row)

    def on_save(self) -> None:
        """Tell of the latest checkpoint, for which those that listen wait."""
        if self._listening("on_save"):
            wait_until_saved(self.run)
            self._call("on_save", self.run.writer.folder / f"step-{self.run.step}")
            self.settle()

    def on_end(self, encoder: Path) -> None:
        if self._listening("on_end"):
            self._call("on_end", encoder)
            self._agree(lambda: None)

    def settle(self) -> bool:
        """Whether a callback has asked to end the run, in any process.

        Raises:
            Exception: a callback raised it; the steps taken are saved.
            OtherProcessFailed: that happened in another process.
        """
        if not self.callbacks:
            return False
        return self._agree(self._save)

    def _agree(self, before: Callable[[], object]) -> bool:
        """Whether the run is to end; where a callback has failed, save first and raise."""
        fault, self._fault = self._fault, None
        failed, ended = agree(fault is not None, self.run.ended_by is not None)
        if not failed:
            if ended:
                self.run.request_stop("a callback in another process")
            return ended
        error = fault or OtherProcessFailed(
            "a callback has failed in another process; its own message says why."
        )
        try:
            before()
        except Exception as other:  # must not hide the first
            error.add_note(f"Nor could the steps taken be saved: {other}")
        raise error

    def _save(self) -> None:
        save(self.run)
        wait_until_saved(self.run)

    def _listening(self, method: str) -> list[Callback]:
        own = getattr(Callback, method)
        return [each for each in self.callbacks if getattr(type(each), method) is not own]

    def _call(self, method: str, argument: Any) -> None:
        """Call the callbacks that have a method; what one raises is kept for `settle`."""
        listening = self._listening(method)
        if not listening or self._fault is not None:
            return
        try:
            with _undone(self.run):
                for each in listening:
                    given = dict(argument) if isinstance(argument, dict) else argument
                    getattr(each, method)(self.run, given)
        except Exception as error:
            self._fault = error


@contextmanager
def _undone(run: Run) -> Iterator[None]:
    """Restore the global random generators, modes of modules, and gradients."""
    device = run.accelerator.device
    models = [run.wrapped, run.published, *([] if run.average is None else [run.average.module])]
    modes = [(part, part.training) for model in models for part in model.modules()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a callback may draw from it
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for part, mode in modes:
            part.training = mode
        for parameter in run.model.parameters():
            parameter.grad = None


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks as a tuple.

    Raises:
        ValueError: something else than a list of instances of `Callback`.
    """
    found = tuple(callbacks) if isinstance(callbacks, Sequence) else (callbacks,)
    for each in found:
        if not isinstance(each, Callback):
            kind = f"the class {each.__name__}" if isinstance(each, type) else type(each).__name__
            raise ValueError(
                f"callbacks must be a list of instances of vicreg_hf.Callback, got {kind}."
            )
        known = {name for name in dir(Callback) if name.startswith("on_")}
        if unknown := [n for n in dir(each) if n.startswith("on_") and n not in known]:
            raise ValueError(
                f"methods of a callback that begin with on_ must be of {', '.join(sorted(known))}, "
                f"got {', '.join(unknown)} in {type(each).__name__}; give them another name."
            )
    return found


def check_same_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that differ between processes, which would wait for each other in vain.

    Raises:
        ValueError: says what each process has.
    """
    names = [[type(each).__qualname__ for each in callbacks]]
    every = gather_objects(names)
    if any(each != every[0] for each in every):
        listed = "; ".join(", ".join(each) or "none" for each in every)
        raise ValueError(
            f"callbacks must be the same in every process, got {listed}; give all of them "
            "everywhere, and let those that write ask run.accelerator.is_main_process."
        )
