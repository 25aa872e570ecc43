"""Warning that embeddings collapse, with the likely cause."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vicreg_hf.settings.pretraining import PretrainingArguments

LEAST_STD = 0.1
"""Mean standard deviation of embedding dimensions below which they have collapsed; the loss draws
it towards 1."""
LEAST_RANK, RANK_OF_A_LINE = 0.03, 2.0
"""Effective rank of a batch's embeddings below which they have collapsed: as a share of
min(N, D), the highest rank there can be, and in dimensions if that is more."""
LEAST_ROWS, LEAST_STEPS = 5, 100
"""Logged rows and steps for which embeddings must stay collapsed, after warm-up."""


class CollapseWatch:
    """Reads each row of the metrics log, and warns once while embeddings stay collapsed.

    Args:
        rows: logged so far by the run that is resumed.
    """

    def __init__(
        self, args: PretrainingArguments, steps_per_epoch: int, rows: Iterable[dict[str, Any]] = ()
    ) -> None:
        assert args.warmup_epochs is not None
        self.args, self.warmup_steps = args, round(args.warmup_epochs * steps_per_epoch)
        self.highest_rank = min(args.batch_size, args.expander_widths[-1])
        self.least_rank = max(RANK_OF_A_LINE, LEAST_RANK * self.highest_rank)
        self.collapsed_steps: list[int] = []
        """Steps of the latest rows, all of which were collapsed."""
        self.warned = False
        for row in rows:
            self.warning_for(row)

    def warning_for(self, row: dict[str, Any]) -> str | None:
        """A sentence if embeddings have stayed collapsed and no earlier row was warned of."""
        if "embedding_std" not in row or row["step"] <= self.warmup_steps:
            return None
        args, small_std = self.args, row["embedding_std"] < LEAST_STD
        if not small_std and row["effective_rank"] >= self.least_rank:
            self.collapsed_steps, self.warned = [], False
            return None
        steps = self.collapsed_steps
        steps.append(row["step"])
        if self.warned or len(steps) < LEAST_ROWS or steps[-1] - steps[0] < LEAST_STEPS:
            return None
        self.warned = True
        if small_std:
            found = f"their std is {row['embedding_std']:.3f}, below {LEAST_STD}, and should near 1"
            remedy = (
                f"The variance term is too weak: raise --std_coeff, now {args.std_coeff:g}, to "
                f"--sim_coeff, {args.sim_coeff:g}."
                if args.std_coeff < args.sim_coeff
                else f"The steps may be too large: lower --base_lr, now {args.base_lr:g}, or "
                f"lengthen --warmup_epochs, now {args.warmup_epochs:g}."
            )
        else:
            found = (
                f"their effective rank is {row['effective_rank']:.1f}, below "
                f"{self.least_rank:.1f}, of the {self.highest_rank} that batch_size and "
                "expander_dims allow"
            )
            remedy = (
                f"The covariance term is too weak: raise --cov_coeff, now {args.cov_coeff:g}; "
                f"the authors' is a 25th of --std_coeff, {args.std_coeff:g}."
                if args.cov_coeff < args.std_coeff / 100
                else "The steps may be too large or the expander too narrow: lower --base_lr, now "
                f"{args.base_lr:g}, or widen --expander_dims, now {args.expander_dims}."
            )
        if (
            "loss" in row and "variance" not in row
        ):  # of a loss of one's own, without VICReg's coefficients
            remedy = (
                "The loss may not keep them apart, or the steps are too large: lower --base_lr, "
                f"now {args.base_lr:g}, or change the loss."
            )
        return f"embeddings have collapsed since step {steps[0]}: {found}. {remedy}"
