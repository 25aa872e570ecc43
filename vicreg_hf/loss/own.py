"""A loss of one's own in the place of VICReg's: what it is given, and what it may return.

Shapes: n rows in this process, D embedding dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Any]
"""From two (n, D) embeddings to a scalar, or to named scalars of which one is "loss"."""
LOSS = "loss"


def own_terms(
    loss: Loss, global_views: Sequence[Tensor], local_views: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Call a loss of one's own with every pair that VICReg's invariance term compares.

    It is called outside autocast with float32, or float64 where embeddings are. Of two views that
    is one call; of more, the mean over all pairs of global views, and of a global and a local one.

    Args:
        loss: gets the rows of this process, as `vicreg_loss` does. One that compares rows has those
            of all processes by `gather_with_gradient`.
        global_views: two or more (n, D).
        local_views: further (n, D), of smaller crops.

    Returns:
        The named scalars; only "loss" carries a gradient.

    Raises:
        ValueError: the loss returns something else.
    """
    pairs = [
        *itertools.combinations(global_views, 2),
        *itertools.product(global_views, local_views),
    ]
    with torch.autocast(global_views[0].device.type, enabled=False):
        found = [named_terms(loss(_single(z), _single(other))) for z, other in pairs]
    if any(terms.keys() != found[0].keys() for terms in found):
        raise ValueError("loss must return the same names for every pair of views.")
    terms = {name: torch.stack([each[name] for each in found]).mean() for name in found[0]}
    return {name: x if name == LOSS else x.detach() for name, x in terms.items()}


def named_terms(result: Any) -> dict[str, Tensor]:
    """The scalars that a loss has returned, by name; a single one is "loss".

    Raises:
        ValueError: they are no scalars, or none is called "loss".
    """
    found = result._asdict() if hasattr(result, "_asdict") else result
    found = {LOSS: found} if isinstance(found, Tensor) else found
    wrong = type(result).__name__
    if isinstance(found, Mapping) and isinstance(found.get(LOSS), Tensor):
        main = cast(Tensor, found[LOSS])
        terms = {str(k): torch.as_tensor(v, device=main.device) for k, v in found.items()
                 if isinstance(v, (Tensor, int, float))}  # fmt: skip
        shapes = {name: tuple(x.shape) for name, x in terms.items() if x.numel() != 1}
        if len(terms) == len(found) and not shapes and main.is_floating_point():
            return {name: x.reshape(()).to(main.dtype) for name, x in terms.items()}
        wrong = f"shapes {shapes}" if shapes else f"{wrong} of {', '.join(map(str, found))}"
    elif isinstance(found, Mapping):
        wrong = f"the names {', '.join(map(str, found)) or 'none'}"
    raise ValueError(
        "loss must return a scalar tensor, or a mapping or NamedTuple of named scalars of which "
        f'one is "loss", got {wrong}.'
    )


def name_of_loss(loss: Any) -> str | None:
    """The qualified name by which a loss is known again; None of VICReg's own."""
    if loss is None:
        return None
    inner = getattr(loss, "func", loss)  # of functools.partial
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"


def _single(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
