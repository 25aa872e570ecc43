"""A device that is the CPU under another name, for what can be known of a GPU without one.

    python tests/helpers/elsewhere.py RUNS.json

Its tensors mix with the CPU's as little as a GPU's do, and whoever asks for their values is
noted: on a GPU he waits there until all that was asked for before is done. So is whoever copies to
it without `non_blocking`, which waits for the copy. Numbers are the CPU's,
bit for bit. RUNS.json holds flags of pretrain.py, run by run; printed is for each where it waited.
"""

from __future__ import annotations

import collections
import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
PACKAGE = f"{Path(__file__).resolve().parents[2] / 'vicreg_hf'}{os.sep}"
aten = torch.ops.aten
ASKS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select}
"""Operations whose answer, or its size, the host must know."""
COPIES = {aten.copy_, aten._to_copy}
CROSSES = {*COPIES, aten.set_, aten._has_compatible_shallow_copy_type}
"""Operations that may have tensors of both devices."""
waits: collections.Counter[str] = collections.Counter()


class Backend:
    """What torch asks of a device's module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        answers = {"is_available": True, "is_initialized": True, "device_count": 1,
                   "current_device": 0, "_is_in_bad_fork": False,
                   "get_rng_state": torch.get_rng_state()}  # fmt: skip
        return lambda *_: answers.get(name)


class Elsewhere(torch.Tensor):
    """A tensor of that device, around one of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    def tolist(self) -> Any:
        note()
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise TypeError(f"a tensor is {NAME} and no array")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, *words: Any) -> Any:
        return call(*words)


class Pretend(TorchDispatchMode):
    """Where tensors may be made on that device."""

    def __torch_dispatch__(self, *words: Any) -> Any:
        return call(*words)


def note() -> None:
    """Remember which function of the package waits."""
    frame = inspect.currentframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    code = None if frame is None else frame.f_code
    waits["outside" if code is None else f"{Path(code.co_filename).stem}.{code.co_name}"] += 1


def call(func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Do what torch has been asked for by the CPU, and note it where a GPU would have waited."""
    name, kwargs = func.overloadpacket, kwargs or {}
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    wanted = kwargs.get("device")
    there = torch.device(wanted).type == NAME if wanted is not None else bool(away)
    if name is aten.copy_:
        there = isinstance(args[0], Elsewhere)
    if away and (name in ASKS or (name in CROSSES and not there)):
        note()
    if there and name in COPIES and not kwargs.get("non_blocking") and True not in args[2:]:
        source = args[name is aten.copy_]
        if not isinstance(source, Elsewhere) and source.numel() > 0:
            note()
    here = [x for x in tensors if not isinstance(x, Elsewhere)]
    if away and name not in CROSSES and any(x.ndim for x in here):
        raise RuntimeError(f"{func} has tensors of the CPU and of another device")
    args_here, kwargs_here = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    if wanted is not None:
        kwargs_here = kwargs_here | {"device": torch.device("cpu")}
    out = func(*args_here, **kwargs_here)
    if not there or name is aten._local_scalar_dense:
        return out
    out = tree_map_only(torch.Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if away else out


def made_there(make: Any, values: Any, *args: Any, device: Any = None, **given: Any) -> Any:
    """What `torch.tensor` makes, also on that device."""
    tensor = values if isinstance(values, Elsewhere) else make(values, *args, **given)
    return tensor if device is None else tensor.to(device)


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, functools.partial(made_there, getattr(torch, name)))
    from vicreg_hf.settings.command_line import parse_arguments
    from vicreg_hf.training.pretrain import pretrain

    found = []
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        waits.clear()
        with Pretend():
            pretrain(parse_arguments(flags))
        found.append(dict(waits))
    print("\n" + json.dumps(found))
