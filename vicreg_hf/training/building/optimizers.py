"""The authors' LARS, and timm's optimisers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import NoneType
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.checks import check_number
from vicreg_hf.runtime.distributed import norms_of, own_part
from vicreg_hf.training.building.parameter_groups import (
    check_optimizer_args,
    layer_groups,
    made,
)

OWN = ("weight_decay", "eta", "clip", "foreach", "fused", "lr_scale")
"""Settings of a parameter group that no loaded state replaces, beside those in optimizer_args."""
FUSED = (Adam, AdamW, SGD)
"""Optimisers that torch has fused over all parameters, on CPU and on CUDA."""


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, as the authors' code has it.

    Parameters of one dimension (biases, normalisation) get neither weight decay nor adaptation.
    The norm in the trust ratio is that of gradient plus weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: factor of the sum of earlier scaled updates, without damping.
        weight_decay: added to the gradient as weight_decay * p.
        eta: trust coefficient.
        clip: let no parameter learn faster than without adaptation: the rate of each is at most lr,
            min(eta * |p| / |grad + weight_decay * p|, lr). solo-learn's clip_lr does the same with
            |grad| + weight_decay * |p| in the denominator.
        foreach: update many parameters at once, which only rounds otherwise; None does so on CUDA,
            as torch.optim.

    Raises:
        ValueError: a setting, also in a parameter group, is not a finite number of at least 0, or
            momentum is above 1.

    Source: vicreg@4e12602, main_vicreg.py, LARS; You et al. 2017, arXiv:1708.03888; clip from
    solo-learn, solo/utils/lars.py.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        eta: float = 1e-3,
        *,
        clip: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta,
            "clip": clip, "foreach": foreach,
        }  # fmt: skip
        super().__init__(params, defaults)  # pyright: ignore[reportArgumentType]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_numbers(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state that was saved before there were these
            group.setdefault("clip", False)
            group.setdefault("foreach", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            together = group["foreach"]
            if together is None:
                together = all(p.is_cuda for p in params)
            if together or any(isinstance(p, DTensor) for p in params):
                self._update_together([p for p in params if p.ndim > 1], group, adapt=True)
                self._update_together([p for p in params if p.ndim <= 1], group, adapt=False)
                continue
            for p in params:
                self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        update = p.grad
        assert update is not None
        if p.ndim > 1:
            update = update.add(p, alpha=group["weight_decay"])
            weight_norm, update_norm = (
                torch.linalg.vector_norm(x, dtype=_norm_dtype(p)) for x in (p, update)
            )
            update = update * _trust_ratio(weight_norm, update_norm, group)
        buffer = self._buffer(p).mul_(group["momentum"]).add_(update)
        p.add_(buffer, alpha=-group["lr"])

    def _update_together(self, params: list[Tensor], group: dict[str, Any], *, adapt: bool) -> None:
        if not params:
            return
        sharded = isinstance(params[0], DTensor)
        lists: Any = [params, [p.grad for p in params], [self._buffer(p) for p in params]]
        lists = [[own_part(x) for x in tensors] for tensors in lists]
        alike: Any = self._group_tensors_by_device_and_dtype(lists).values()
        for (some, updates, buffers), _ in alike:
            dtype = _norm_dtype(some[0])
            torch._foreach_mul_(buffers, group["momentum"])
            if adapt:
                updates = torch._foreach_add(updates, some, alpha=group["weight_decay"])
                weight_norms, update_norms = (
                    norms_of(tensors, sharded=sharded, dtype=dtype) for tensors in (some, updates)
                )
                ratios = _trust_ratio(weight_norms, update_norms, group).unbind()
                torch._foreach_addcmul_(buffers, updates, ratios)
            else:
                torch._foreach_add_(buffers, updates)
            torch._foreach_add_(some, buffers, alpha=-group["lr"])

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _check_numbers(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay", "eta"):
        value = group[name]
        # a rate may be a tensor of torch.optim's, which schedules change in place
        check_number(name, value.item() if isinstance(value, Tensor) and name == "lr" else value)
    if group["momentum"] > 1:
        raise ValueError(f"momentum must be at most 1, got {group['momentum']}.")


def _norm_dtype(p: Tensor) -> torch.dtype | None:
    """Single precision for half: a norm above 65504 would be infinite, and its step zero."""
    return torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else None


def _trust_ratio(weight_norm: Tensor, update_norm: Tensor, group: dict[str, Any]) -> Tensor:
    ratio = group["eta"] * weight_norm / update_norm
    if group["clip"]:  # in terms of lr, by which the update is multiplied; 1 where that is 0
        ratio = torch.where(ratio < group["lr"], ratio / group["lr"], 1.0)
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    lars_eta: float = 1e-3,
    lars_clip: bool = False,
    optimizer_args: Mapping[str, Any] | None = None,
    layer_decay: float | None = None,
) -> Optimizer:
    """The authors' LARS by "lars", else any optimiser of timm's by its name.

    Biases and normalisation parameters are left out of weight decay in either. A loaded state
    brings moments and momentum, and leaves the settings as they are here. torch's
    Adam, AdamW and SGD are fused on CPU and CUDA, where the parameters are now.

    Args:
        model: whose parameters are trained, but for frozen ones.
        lars_eta: eta of `LARS`, the trust coefficient; ignored by other optimisers.
        lars_clip: clip of `LARS`, likewise.
        optimizer_args: further arguments of the optimiser.
        layer_decay: see `layer_groups`; the learning rate of a step is to be multiplied by the
            `lr_scale` of each group. None makes no such groups.

    Raises:
        ValueError: a name timm does not have, arguments that the optimiser has not, settings that
            no checkpoint can hold, or another optimiser than LARS and `FUSED` for a sharded model.
    """
    kind = _class_of(name)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if sharded and kind not in (LARS, *FUSED):
        raise ValueError(
            "optimizer must be lars or torch's adam, adamw or sgd where FSDP shards the model, got "
            f"{name!r}; choose one of these."
        )
    given = check_optimizer_args(name, kind, optimizer_args or {})
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    params: Any = model
    if layer_decay is not None:
        assert isinstance(model, VICRegModel)
        params = layer_groups(model, layer_decay=layer_decay, weight_decay=weight_decay)
    elif kind is LARS:
        params = [p for p in model.parameters() if p.requires_grad]
    if kind is LARS:
        for key, value, default in (("eta", lars_eta, 1e-3), ("clip", lars_clip, False)):
            if given.get(key, value) != value != default:
                raise ValueError(
                    f"lars_{key} must be as in optimizer_args, got {value} and {given[key]}; leave "
                    "one of them out."
                )
            settings[key] = given.pop(key, value)
        optimizer = made(LARS, name, given, params=params, **settings)
    else:
        devices = {p.device.type for p in model.parameters() if p.requires_grad}
        fused = kind in FUSED and not (kind is SGD and sharded)  # torch's does not take DTensors
        if fused and devices <= {"cpu", "cuda"} and not given.keys() & {"foreach", "fused"}:
            settings["fused"] = True
        optimizer = made(create_optimizer_v2, name, given, model_or_params=params, opt=name,
                         **settings)  # fmt: skip
        _check_savable(name, optimizer)
    own = (*OWN, *(optimizer_args or {}))
    optimizer.register_load_state_dict_pre_hook(partial(_with_own_settings, own=own))
    optimizer.register_load_state_dict_post_hook(_lay_out_as_parameters)
    return optimizer


def _class_of(name: str) -> type:
    if name == "lars":
        return LARS
    known = [str(other) for other in list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, ["lars", *known], n=8)
        hint = f"near are {', '.join(near)}." if near else f"timm has {', '.join(known)}."
        raise ValueError(f"optimizer must be lars or one of timm's, got {name!r}; {hint}")
    return cast(type, get_optimizer_class(name, bind_defaults=False))


def _check_savable(name: str, optimizer: Optimizer) -> None:
    for key, value in (item for group in optimizer.param_groups for item in group.items()):
        if not isinstance(value, (bool, int, float, str, list, tuple, Tensor, NoneType)):
            raise ValueError(
                "optimizer must have settings that a checkpoint can hold, without pickle, and "
                f"{name!r} has {key}={value!r}; choose another."
            )


def _with_own_settings(
    optimizer: Optimizer, state: dict[str, Any], *, own: tuple[str, ...]
) -> dict[str, Any]:
    """The state to load, with the settings that this optimiser was made with."""
    saved, mine = state["param_groups"], optimizer.param_groups
    groups = [
        group | {name: settings[name] for name in own if name in settings}
        for group, settings in zip(saved, mine, strict=False)
    ]
    # as many groups as were saved: torch refuses another number
    return state | {"param_groups": groups + saved[len(groups) :]}


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    """Give a loaded state the parameters' memory layout, which files do not keep.

    Fused on a CPU, torch 2.14 goes through memory in order and so takes wrong elements otherwise.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        entries = optimizer.state.get(p, {})
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                entries[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
