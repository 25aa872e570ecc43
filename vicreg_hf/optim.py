"""The authors' LARS, timm's optimisers by name, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

# Paper, appendix C.4: best base learning rate of a 100-epoch run by global batch size.
BASE_LR_BY_BATCH = {128: 0.8, 256: 0.5, 512: 0.4}
BASE_LR_LARGE_BATCH = 0.3
FINAL_LR_FRACTION = 1e-3


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as the authors' code has it.

    Parameters of one dimension (biases, normalisation) get neither weight decay nor adaptation.
    The norm in the trust ratio is that of gradient plus weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: of the scaled updates, without damping.
        weight_decay: added to the gradient as weight_decay * p.
        eta: trust coefficient.

    Raises:
        ValueError: a negative setting.

    Source: vicreg@4e12602, main_vicreg.py, LARS; You et al. 2017, arXiv:1708.03888.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        eta: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}.")
        super().__init__(params, defaults)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        update = p.grad
        assert update is not None
        if p.ndim > 1:
            update = update.add(p, alpha=group["weight_decay"])
            weight_norm, update_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
            ratio = group["eta"] * weight_norm / update_norm
            usable = (weight_norm > 0) & (update_norm > 0)
            update = update * torch.where(usable, ratio, 1.0)
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        p.add_(buffer, alpha=-group["lr"])


def create_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """The authors' LARS by "lars", else any optimiser of timm's by its name.

    Biases and normalisation parameters are left out of weight decay in either.

    Raises:
        ValueError: a name timm does not have.
    """
    if name == "lars":
        params = [p for p in model.parameters() if p.requires_grad]
        return LARS(params, lr=lr, weight_decay=weight_decay)
    known = [str(other) for other in list_optimizers()]
    if name not in known:
        raise ValueError(
            f"optimizer must be lars or one of timm's, got {name!r}; timm has {', '.join(known)}."
        )
    return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay)


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
