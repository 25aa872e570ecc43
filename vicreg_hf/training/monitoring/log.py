"""metrics.jsonl, and the clock of a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vicreg_hf.runtime.files import replacing


class MetricsLog:
    """metrics.jsonl, which the main process writes: one JSON object a line.

    A number that is not finite, such as a norm that fp16 cannot hold, is null. Each of the
    listeners is called with every row that was written.
    """

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        self.listeners: list[Callable[[dict[str, Any]], object]] = []

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):  # torn by a kill; it is written again
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append({k: math.nan if v is None else v for k, v in row.items()})
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Append a row.

        Raises:
            OSError: the row could not be written, say to a full disk; it names the file.
        """
        if self.enabled:
            try:
                with self.path.open("a") as file:
                    file.write(_line(row))
            except OSError as error:  # that of a write does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            for listener in self.listeners:
                listener(row)

    def amend(self, row: dict[str, Any]) -> None:
        """Add what else is known of a step to its row, which is the last, or a row if it has none.

        Listeners get only what is new.
        """
        rows = self.rows() if self.enabled else []
        if not rows or rows[-1]["step"] != row["step"]:
            self.add(row)
            return
        new = {name: value for name, value in row.items() if name not in rows[-1]}
        with replacing(self.path) as aside:
            aside.write_text("".join(map(_line, [*rows[:-1], rows[-1] | new])))
        for listener in self.listeners:
            listener({"step": row["step"], **new})

    def keep_until(self, step: int) -> None:
        """Drop the rows of later steps than the checkpoint that the run resumes from."""
        if self.enabled:
            kept = [row for row in self.rows() if row["step"] <= step]
            with replacing(self.path) as aside:
                aside.write_text("".join(map(_line, kept)))


def _line(row: dict[str, Any]) -> str:
    numbers = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
    return json.dumps(dict.fromkeys(row) | numbers) + "\n"


class Clock:
    """Views per second since the last restart; evaluation and saving are not counted."""

    def __init__(self, views_per_step: int) -> None:
        self.views_per_step = views_per_step
        self.restart()

    def restart(self) -> None:
        self.steps, self.started = 0, time.perf_counter()

    def tick(self) -> None:
        self.steps += 1

    def rate(self) -> float:
        return self.steps * self.views_per_step / (time.perf_counter() - self.started)
