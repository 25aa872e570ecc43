"""The expander against the authors' Projector."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vicreg_hf.models.expander import expander


@pytest.mark.parametrize(
    ("dims", "layers"),
    [
        ([], []),
        ([5], [nn.Linear]),
        ([5, 7, 2], [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]),
    ],
)
def test_every_layer_but_the_last_is_normalised_and_rectified(
    dims: list[int], layers: list[type[nn.Module]]
) -> None:
    module = expander(3, dims)
    assert [type(layer) for layer in module] == layers
    linears = [layer for layer in module if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linears] == [3, *dims][: len(dims)]
    assert [layer.out_features for layer in linears] == dims
    assert [layer.bias is not None for layer in linears] == [True] * (len(dims) - 1) + [False] * (
        len(dims) > 0
    )


def test_output_equals_the_layers_written_out() -> None:
    torch.manual_seed(0)
    module, y = expander(3, [5, 2]).double(), torch.randn(6, 3, dtype=torch.float64)
    state = module.state_dict()
    hidden = y @ state["0.weight"].T + state["0.bias"]
    expected = F.relu((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(module(y), expected @ state["3.weight"].T)
