"""Warning that embeddings collapse, with the likely cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from vicreg_hf.arguments import PretrainingArguments

LEAST_STD = 0.1
"""Mean standard deviation of embedding dimensions; the loss draws it towards 1."""
LEAST_RANK = 2.0
"""Effective rank of a batch's embeddings; 1 where they lie on a line."""
ROWS = 5
"""Logged steps in a row, after the warm-up, for which either is below its bound."""


class CollapseWatch:
    """Looks at each row of the metrics log.

    Args:
        rows: logged so far by the run that is resumed.
    """

    def __init__(
        self, args: PretrainingArguments, steps_per_epoch: int, rows: Iterable[dict[str, Any]] = ()
    ) -> None:
        assert args.warmup_epochs is not None
        self.args, self.warmup_steps = args, round(args.warmup_epochs * steps_per_epoch)
        self.last: deque[dict[str, Any]] = deque(maxlen=ROWS)
        self.warned = False
        for row in rows:
            self.look(row)

    def look(self, row: dict[str, Any]) -> str | None:
        """A warning, once, where embeddings have been bad for a while."""
        if "embedding_std" not in row or row["step"] <= self.warmup_steps:
            return None
        self.last.append(row)
        shrunk = self._all("embedding_std", LEAST_STD)
        flat = self._all("effective_rank", LEAST_RANK)
        if not (shrunk or flat):
            self.warned = False
        if not (shrunk or flat) or self.warned:
            return None
        self.warned = True
        return self._sentence(row, shrunk)

    def _all(self, name: str, bound: float) -> bool:
        return len(self.last) == ROWS and all(row[name] < bound for row in self.last)

    def _sentence(self, row: dict[str, Any], shrunk: bool) -> str:
        return f"{row} {shrunk}"
