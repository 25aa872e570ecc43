"""Parts of the encoders that training leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from types import MethodType

from torch import nn

from vicreg_hf.modeling_vicreg import VICRegModel

SECOND = "prime"
"""The word that begins names of the second branch's encoder."""


def freeze(model: VICRegModel, patterns: str | None) -> None:
    """Freeze parameters of the encoders, and the running statistics beside them.

    A pattern of fnmatch's, such as `blocks.[0-3]`, holds for a whole name of a module or parameter,
    and so for all that is inside a module. Normalisation whose module is named, or whose parameters
    are all frozen, stays in eval mode: it normalises by its running statistics, and keeps them.

    Args:
        model: as it will be trained, with batch normalisation synchronised already.
        patterns: separated by commas; those of the second branch begin with `prime`.

    Raises:
        ValueError: a pattern that matches nothing, or nothing is left of the encoders to train.
    """
    if patterns is None:
        return
    encoders = {"": model.backbone}
    if model.prime is not None:
        encoders[SECOND] = model.prime.backbone
    names = {
        _joined(prefix, name): parameter
        for prefix, encoder in encoders.items()
        for name, parameter in encoder.named_parameters()
    }
    frozen: set[str] = set()
    listed = [word.strip() for word in patterns.split(",")]
    for pattern in listed:
        found = {name for name in names if _matches(name, pattern)}
        if not found:
            raise ValueError(_matches_nothing(pattern, list(names)))
        frozen |= found
    if frozen == names.keys():
        raise ValueError(
            f"freeze must leave a part of the encoder to train, got {patterns!r}, which is all of "
            f"its {len(names)} parameters; --layer_decay lets early layers learn slowly."
        )
    for name in frozen:
        names[name].requires_grad_(False)
    for prefix, encoder in encoders.items():
        for name, part in encoder.named_modules():
            own = {_joined(prefix, name, key) for key, _ in part.named_parameters()}
            whole = any(_matches(_joined(prefix, name), pattern) for pattern in listed)
            if _has_statistics(part) and (whole or (own and own <= frozen)):
                part.train = MethodType(_stay_in_eval, part)  # as copies of the model bind it anew
                part.eval()


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is the name of a parameter or module, or of a module around it."""
    second = name.split(".")[0] == SECOND
    if second != (pattern.split(".")[0] == SECOND):
        return False
    return any(fnmatchcase(place, pattern) for place in _places(name))


def _places(name: str) -> Iterable[str]:
    """The modules around a parameter, from the outermost, and itself."""
    return accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}")


def _matches_nothing(pattern: str, names: list[str]) -> str:
    places = dict.fromkeys(place for name in names for place in _places(name))
    near = get_close_matches(pattern, places, n=4, cutoff=0.5)
    tops = list(dict.fromkeys(name.split(".")[0] for name in names))
    hint = f"near are {', '.join(near)}" if near else f"the encoder has {', '.join(tops)}"
    return f"freeze must name modules or parameters of the encoder, got {pattern!r}; {hint}."


def _has_statistics(part: nn.Module) -> bool:
    """Whether a module itself, as batch normalisation, counts what passes it."""
    return any(key.startswith("running_") for key, _ in part.named_buffers(recurse=False))


def _stay_in_eval(part: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
    """Stand in for `train` of a frozen module."""
    return nn.Module.train(part, False)
