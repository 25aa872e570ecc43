"""Warning that embeddings collapse, with the likely cause."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vicreg_hf.settings.pretraining import PretrainingArguments

LEAST_STD = 0.1
"""Mean standard deviation of embedding dimensions; the loss draws it towards 1."""
LEAST_RANK, RANK_OF_A_LINE = 0.03, 2.0
"""Effective rank of a batch's embeddings: as a share of min(N, D), the most it can be; and where
that is little."""
ROWS, STEPS = 5, 100
"""For so many logged rows, and so many steps, either must stay below its bound after warm-up."""


class CollapseWatch:
    """Looks at each row of the metrics log, and warns once where embeddings stay bad.

    Args:
        rows: logged so far by the run that is resumed.
    """

    def __init__(
        self, args: PretrainingArguments, steps_per_epoch: int, rows: Iterable[dict[str, Any]] = ()
    ) -> None:
        assert args.warmup_epochs is not None
        self.args, self.warmup_steps = args, round(args.warmup_epochs * steps_per_epoch)
        self.least_rank = max(
            RANK_OF_A_LINE, LEAST_RANK * min(args.batch_size, args.expander_widths[-1])
        )
        self.spell: list[int] = []
        """Steps of the rows in a row that were bad."""
        self.warned = False
        for row in rows:
            self.look(row)

    def look(self, row: dict[str, Any]) -> str | None:
        """A sentence where embeddings have been bad for a while and it was not said yet."""
        if "embedding_std" not in row or row["step"] <= self.warmup_steps:
            return None
        shrunk = row["embedding_std"] < LEAST_STD
        if not shrunk and row["effective_rank"] >= self.least_rank:
            self.spell, self.warned = [], False
            return None
        self.spell.append(row["step"])
        long = len(self.spell) >= ROWS and self.spell[-1] - self.spell[0] >= STEPS
        if not long or self.warned:
            return None
        self.warned = True
        found, remedy = self._shrunk(row) if shrunk else self._flat(row)
        return f"embeddings have collapsed since step {self.spell[0]}: {found}. {remedy}"

    def _shrunk(self, row: dict[str, Any]) -> tuple[str, str]:
        args = self.args
        found = f"their std is {row['embedding_std']:.3f}, below {LEAST_STD}, and should near 1"
        if args.std_coeff < args.sim_coeff:
            return found, (
                f"The variance term is too weak: raise --std_coeff, now {args.std_coeff:g}, to "
                f"--sim_coeff, {args.sim_coeff:g}."
            )
        return found, (
            f"The steps may be too large: lower --base_lr, now {args.base_lr:g}, or lengthen "
            f"--warmup_epochs, now {args.warmup_epochs:g}."
        )

    def _flat(self, row: dict[str, Any]) -> tuple[str, str]:
        args = self.args
        found = (
            f"their effective rank is {row['effective_rank']:.1f}, below {self.least_rank:.1f}, of "
            f"the {min(args.batch_size, args.expander_widths[-1])} that batch_size and "
            "expander_dims allow"
        )
        if args.cov_coeff < args.std_coeff / 100:
            return found, (
                f"The covariance term is too weak: raise --cov_coeff, now {args.cov_coeff:g}; "
                f"the authors' is a 25th of --std_coeff, {args.std_coeff:g}."
            )
        return found, (
            f"The steps may be too large or the expander too narrow: lower --base_lr, now "
            f"{args.base_lr:g}, or widen --expander_dims, now {args.expander_dims}."
        )
