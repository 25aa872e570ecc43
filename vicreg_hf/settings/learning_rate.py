"""The learning rate: the base rate where none is given, and the rate of each step."""

from __future__ import annotations

import math

BASE_LR_BY_BATCH = {128: 0.8, 256: 0.5, 512: 0.4}
BASE_LR_LARGE_BATCH = 0.3
"""Paper, appendix C.4: best base learning rate of a 100-epoch run by global batch size."""
FINAL_LR_FRACTION = 1e-3


def default_base_lr(optimizer: str, batch_size: int) -> float:
    """The base learning rate per 256 images where none is given.

    For LARS the paper's table by batch size; for others 1e-3, AdamW's usual one.
    """
    if optimizer != "lars":
        return 1e-3
    at_least = [rate for size, rate in BASE_LR_BY_BATCH.items() if batch_size <= size]
    return at_least[0] if at_least else BASE_LR_LARGE_BATCH


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from zero, then a cosine to a thousandth of the peak.

    Args:
        step: the optimiser step about to be taken, from 0.
        peak: base_lr * batch_size / 256.

    Source: vicreg@4e12602, main_vicreg.py, adjust_learning_rate.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * done))
    return peak * share + peak * FINAL_LR_FRACTION * (1 - share)
