"""The expander: the MLP between representation and embedding, dropped after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def expander(num_features: int, dims: Sequence[int]) -> nn.Sequential:
    """Linear + BatchNorm + ReLU for every width but the last, which is a Linear without bias.

    Args:
        num_features: F, width of the representation.
        dims: widths of the layers; the last is D. Empty gives the identity.

    Source: vicreg@4e12602, main_vicreg.py, Projector.
    """
    widths = [num_features, *dims]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    if dims:
        layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    return nn.Sequential(*layers)
