"""What a run says in the terminal while it trains: a line for each logged row, and a bar below."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.loss.autograd import VICRegTerms
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.settings.recipes import read_about, read_recipe, recipe_names
from vicreg_hf.training.monitoring.knn import K
from vicreg_hf.training.monitoring.log import MetricsLog

WARM_STEPS = 3
"""First steps of a session, which compile, start workers and fill caches: they are not timed."""
LEAST_SECONDS, LEAST_STEPS = 5.0, 3
"""Time and steps after those before the expected duration is said."""
LONG_ON_CPU = 2 * 3600.0
"""Expected duration in seconds above which recipes for CPUs are named."""

NO_BREAK = "\xa0"
"""The space at which no line is broken."""


class Progress:
    """Shows the rows of a run's metrics log, and estimates how long the run will take.

    Args:
        args: the settings as resolved.
        measures: whether the last step is measured.
        terms: names of the loss's terms.
        on_cpu: whether a CPU trains.
    """

    def __init__(
        self, args: PretrainingArguments, log: MetricsLog, *, total_steps: int, measures: bool,
        terms: Sequence[str], on_cpu: bool,
    ) -> None:  # fmt: skip
        self.args, self.log, self.total_steps = args, log, total_steps
        self.measures, self.terms, self.on_cpu = measures, terms, on_cpu
        self.first: dict[str, Any] | None = None
        """The row from before training, if there is one."""
        self.step = self.timed_steps = 0
        self.begun, self.paused, self.last_pause = 0.0, 0.0, 0.0
        self._ticks, self._said = 0, False
        log.listeners.append(self.show)

    def bar(self, batches: Iterable[Any], *, step: int) -> Iterable[Any]:
        """The batches with a bar that counts them, where a person watches.

        Args:
            step: from which the run goes on.
        """
        return tqdm(
            batches, "pretraining", self.total_steps, initial=step, unit="step", dynamic_ncols=True,
            disable=None if self.log.enabled else True,
        )  # fmt: skip

    def tick(self, step: int) -> None:
        """Note that a step was taken; the main process says once how long the run will take."""
        self.step, self._ticks, now = step, self._ticks + 1, time.perf_counter()
        if self._ticks <= WARM_STEPS:
            self.begun, self.paused = now, 0.0
            return
        self.timed_steps = self._ticks - WARM_STEPS
        enough = self.timed_steps >= LEAST_STEPS and now - self.begun >= LEAST_SECONDS
        if enough and step < self.total_steps and not self._said and self.log.enabled:
            self._said = True
            _say(self.expectation())

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Leave a measurement out of the time of steps, and remember how long it took."""
        started = time.perf_counter()
        yield
        self.last_pause = time.perf_counter() - started
        self.paused += self.last_pause

    @property
    def seconds_per_step(self) -> float:
        """Mean over the timed steps of this session, with logging and saving."""
        return (time.perf_counter() - self.begun - self.paused) / self.timed_steps

    @property
    def seconds_left(self) -> float | None:
        """Expected time until the last step and its measurement, or None before steps are timed."""
        if self.timed_steps == 0:
            return None
        steps, every = self.total_steps - self.step, self.args.knn_steps
        times = 1 if self.measures and steps else 0
        if every and times:  # the last step is measured in any case
            times += (self.total_steps - 1) // every - self.step // every
        return steps * self.seconds_per_step + times * self.last_pause

    def expectation(self) -> str:
        """The sentence on the expected duration, with recipes for CPUs where that is long."""
        left = self.seconds_left
        assert left is not None
        steps = self.total_steps - self.step
        said = (
            f"Expected duration of the {steps:,} steps that are left: {duration(left)}, at "
            f"{duration(self.seconds_per_step)} a step."
        )
        if self.on_cpu and left > LONG_ON_CPU:
            meant = recipes_for_cpus(self.args)
            said += " " + (
                f"Recipes that are meant for a CPU: {', '.join(meant)}."
                if meant
                else "Fewer --num_train_epochs, a smaller --image_size or a GPU shorten it."
            )
        return said

    def show(self, row: Mapping[str, Any]) -> None:
        """Print the line of a row of metrics.jsonl."""
        if self.first is None:
            rows = self.log.rows()
            self.first = rows[0] if rows and rows[0]["step"] == 0 else {}
        self.step = row["step"]
        line = line_of(
            row, total_steps=self.total_steps, first=self.first, left=self.seconds_left,
            terms=self.terms,
        )  # fmt: skip
        _say(line)


def line_of(
    row: Mapping[str, Any],
    *,
    total_steps: int,
    first: Mapping[str, Any],
    left: float | None,
    terms: Sequence[str] = VICRegTerms._fields[1:],
) -> str:
    """The line of a row of metrics.jsonl, of what it has.

    Args:
        first: the row from before training, with which kNN accuracies are compared; may be empty.
        left: the expected seconds until the end, if known.
        terms: names of the loss's terms.
    """
    parts = [f"step {row['step']}/{total_steps}"]
    if "loss" in row:
        names = [name for name in terms if name in row]
        terms = ", ".join(f"{name} {_number(row[name], 2)}" for name in names)
        parts.append(f"loss {_number(row['loss'], 3)}" + (f" ({terms})" if terms else ""))
    if "knn" in row:
        same = first.get("knn_images") == row.get("knn_images")
        others = {"start": first.get("knn") if row["step"] else None,
                  "pixels": first.get("knn_pixels")} if same else {}  # fmt: skip
        beside = ", ".join(f"{k} {100 * v:.1f}" for k, v in others.items() if v is not None)
        parts.append(f"{K}-NN {100 * row['knn']:.1f} %" + (f" ({beside})" if beside else ""))
    elif "sample_effective_rank" in row:
        parts.append(f"effective rank of representations {row['sample_effective_rank']:.3g}")
    if "probe" in row:
        parts.append(f"probe {100 * row['probe']:.1f} %")
    if "views_per_second" in row:
        parts.append(f"{_number(row['views_per_second'], 2)} views/s")
    if left is not None and row["step"] < total_steps:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time in the units that a person would take: 0.43 s, 40 s, 4 min, 3 h 10 min, 2 d 5 h."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def recipes_for_cpus(args: PretrainingArguments) -> list[str]:
    """Recipes whose description names CPUs, as flags, with the images they are for.

    Left out are those of the run's own architecture, and of the demo unless that is trained on.
    """
    found = []
    for name in recipe_names():
        about, settings = read_about(name), read_recipe(name, PretrainingArguments)
        own = settings.get("architecture") == args.architecture
        other = settings.get("dataset_name") == DEMO != args.dataset_name
        if "CPU" in about["hardware"] and not own and not other:
            found.append(f"--config {name} ({about['data'].removesuffix('.')})")
    return found


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _say(text: str) -> None:
    """Print above the bar; a line too long for the terminal breaks where its parts end."""
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns)
        if "  " in text:
            text = re.sub(r"(?<! ) (?! )", NO_BREAK, text)
        text = textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False)
        text = text.replace(NO_BREAK, " ")
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
