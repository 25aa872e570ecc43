"""The expander against the authors' Projector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicreg_hf.models.expander import expander


def projector(widths: list[int]) -> nn.Sequential:
    """vicreg@4e12602, main_vicreg.py, Projector, written out."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 2):
        layers.append(nn.Linear(widths[i], widths[i + 1]))
        layers.append(nn.BatchNorm1d(widths[i + 1]))
        layers.append(nn.ReLU(True))
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("dims", [[5], [5, 7, 2]])
def test_the_expander_is_the_authors_projector(dims: list[int]) -> None:
    ours, theirs, y = expander(3, dims), projector([3, *dims]), torch.randn(6, 3)
    assert str(ours) == str(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(y), theirs(y))
    assert torch.equal(expander(3, [])(y), y)
