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
        ([5, 7], [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]),
        ([5, 7, 2], [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]),
    ],
)
def test_every_layer_but_the_last_is_normalised_and_rectified(
    dims: list[int], layers: list[type[nn.Module]]
) -> None:
    assert [type(layer) for layer in expander(3, dims)] == layers


def test_widths_follow_the_dims_and_only_the_last_layer_lacks_a_bias() -> None:
    linears = [layer for layer in expander(3, (5, 7, 2)) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [
        (3, 5),
        (5, 7),
        (7, 2),
    ]
    assert [layer.bias is not None for layer in linears] == [True, True, False]


def test_without_dims_the_representation_is_the_embedding() -> None:
    y = torch.randn(4, 3)
    assert torch.equal(expander(3, [])(y), y)


def test_output_equals_the_layers_written_out() -> None:
    torch.manual_seed(0)
    module = expander(3, [5, 2])
    state, y = module.state_dict(), torch.randn(6, 3)
    hidden = y @ state["0.weight"].T + state["0.bias"]
    expected = F.relu((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(module(y), expected @ state["3.weight"].T)
