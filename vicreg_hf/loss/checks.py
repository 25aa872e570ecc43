"""What the loss takes: embeddings, weights and constants."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vicreg_hf.runtime.checks import check_number

VarianceReduction = Literal["mean", "sum"]


def check_tensors(*branches: Any) -> None:
    """Refuse what is no tensor."""
    if not all(isinstance(z, Tensor) for z in branches):
        received = " and ".join(type(z).__name__ for z in branches)
        raise ValueError(
            f"embeddings must be tensors, got {received}; convert arrays with torch.as_tensor."
        )


def check_embeddings(*branches: Tensor) -> None:
    """Refuse integer embeddings, those of no dimensions, and branches on several devices."""
    if not all(z.is_floating_point() for z in branches):
        received = " and ".join(str(z.dtype) for z in branches)
        raise ValueError(
            f"embeddings must be floating point, got {received}; convert them with .float()."
        )
    if branches[0].shape[1] == 0:
        raise ValueError(
            f"embeddings must have at least 1 dimension, got shape {tuple(branches[0].shape)}."
        )
    if any(z.device != branches[0].device for z in branches):
        received = " and ".join(str(z.device) for z in branches)
        raise ValueError(
            f"embeddings must be on the same device, got {received}; move them with .to(device)."
        )


def check_weights(**given: float) -> None:
    """Refuse weights and constants of the loss that are not finite numbers of at least 0."""
    for name, value in given.items():
        check_number(name, value)


def find_branch_weight(variance_reduction: VarianceReduction) -> float:
    """What each of two branches counts in the variance term."""
    if variance_reduction not in ("mean", "sum"):
        raise ValueError(f"variance_reduction must be mean or sum, got {variance_reduction!r}.")
    return 0.5 if variance_reduction == "mean" else 1.0
