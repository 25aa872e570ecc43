"""Embeddings, coefficients and constants that the loss takes; all others are refused."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vicreg_hf.runtime.checks import check_number

VarianceReduction = Literal["mean", "sum"]


def check_embeddings(rule: str, *views: Any) -> None:
    """Refuse embeddings that are not alike: tensors (rows, dimensions) of floats on one device.

    Args:
        rule: how the message about their shape begins, with the caller's names for them.
    """
    if not all(isinstance(z, Tensor) for z in views):
        received = " and ".join(type(z).__name__ for z in views)
        raise ValueError(
            f"embeddings must be tensors, got {received}; convert arrays with torch.as_tensor."
        )
    if views[0].ndim != 2 or any(z.shape != views[0].shape for z in views):
        received = " and ".join(str(tuple(z.shape)) for z in views)
        raise ValueError(f"{rule} (rows, dimensions), got {received}.")
    if not all(z.is_floating_point() for z in views):
        received = " and ".join(str(z.dtype) for z in views)
        raise ValueError(
            f"embeddings must be floating point, got {received}; convert them with .float()."
        )
    if views[0].shape[1] == 0:
        raise ValueError(
            f"embeddings must have at least 1 dimension, got shape {tuple(views[0].shape)}."
        )
    if any(z.device != views[0].device for z in views):
        received = " and ".join(str(z.device) for z in views)
        raise ValueError(
            f"embeddings must be on the same device, got {received}; move them with .to(device)."
        )


def check_coefficients(
    *, variance_reduction: VarianceReduction = "mean", **coefficients: float
) -> None:
    """Refuse coefficients that are not finite numbers of at least 0, and unknown reductions."""
    for name, value in coefficients.items():
        check_number(name, value)
    if variance_reduction not in ("mean", "sum"):
        raise ValueError(f"variance_reduction must be mean or sum, got {variance_reduction!r}.")
