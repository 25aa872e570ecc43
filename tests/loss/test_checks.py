"""Embeddings and settings that the losses refuse."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from authors_loss import authors_loss, embeddings

from vicreg_hf import VICRegLoss, covariance_term, multi_view_loss, variance_term, vicreg_loss

Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([Z, Z[:, :2]], r"shape \(rows, dimensions\), got \(4, 3\) and \(4, 2\)"),
        ([Z, Z[:3]], r"\(4, 3\) and \(3, 3\)"),
        ([Z[0], Z[0]], r"\(rows, dimensions\), got \(3,\)"),
        ([Z[None], Z[None]], r"\(rows, dimensions\), got \(1, 4, 3\)"),
        ([Z.long(), Z], "floating point, got torch.int64 and torch.float32; convert"),
        ([Z[:1], Z[:1]], "at least 2 rows over all processes, got 1"),
        ([Z[:0], Z[:0]], "at least 2 rows over all processes, got 0"),
        ([Z[:, :0], Z[:, :0]], r"at least 1 dimension, got shape \(4, 0\)"),
        ([Z.numpy(), None], "must be tensors, got ndarray and NoneType; convert arrays with torch"),
        ([Z, Z.to("meta")], "on the same device, got cpu and meta"),
    ],
)
def test_embeddings_that_cannot_be_are_refused_by_every_loss(views: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicreg_loss(*views)
    with pytest.raises(ValueError, match=message):
        multi_view_loss(views)
    alone = message.split(" and ")[0]
    for term in (variance_term, covariance_term):
        if len({getattr(z, "shape", None) for z in views}) == 1 and "device" not in message:
            with pytest.raises(ValueError, match=alone):
                term(views[0])


@pytest.mark.parametrize(
    ("global_views", "local_views", "message"),
    [
        ([], [], "^global_views must hold at least 2 views, got 0"),
        ([Z], [Z, Z], "^global_views must hold at least 2 views, got 1"),
        (Z, Z, r"^global_views must be a list of tensors .*, got Tensor of shape \(4, 3\)\.$"),
        ((z for z in [Z, Z]), [], "^global_views must be a list of tensors .*, got generator"),
        ([Z, Z], Z, r"^local_views must be a list of tensors .*, got Tensor of shape \(4, 3\)"),
    ],
)
def test_views_that_are_no_lists_or_too_few_are_refused(
    global_views: Any, local_views: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        multi_view_loss(global_views, local_views)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True, torch.ones(())])
@pytest.mark.parametrize("name", ["sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps"])
def test_coefficients_that_cannot_be_are_refused(name: str, value: Any) -> None:
    message = f"^{name} must be a finite number of at least 0, got {re.escape(repr(value))}.$"
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=message):
        VICRegLoss(**settings)
    with pytest.raises(ValueError, match=message):
        vicreg_loss(Z, Z, **settings)
    with pytest.raises(ValueError, match=message):
        multi_view_loss([Z, Z], **settings)
    if name in ("gamma", "eps"):
        with pytest.raises(ValueError, match=message):
            variance_term(Z, **settings)


def test_an_unknown_variance_reduction_is_refused() -> None:
    reduction: Any = "median"
    for refused in (
        lambda: vicreg_loss(Z, Z, variance_reduction=reduction),
        lambda: VICRegLoss(variance_reduction=reduction),
        lambda: multi_view_loss([Z, Z, Z], variance_reduction=reduction),
    ):
        with pytest.raises(ValueError, match="mean or sum, got 'median'"):
            refused()


def test_numbers_may_be_integers_and_those_of_numpy() -> None:
    z, z_prime = embeddings(6, 4)
    numbers: Any = {"sim_coeff": np.float32(2), "std_coeff": np.int64(3), "cov_coeff": 5}
    expected = vicreg_loss(z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0)
    assert torch.equal(vicreg_loss(z, z_prime, **numbers).loss, expected.loss)


def test_the_module_shows_its_settings_and_computes_with_them() -> None:
    module = VICRegLoss(2.0, 3.0, 5.0, gamma=1.5, eps=1e-3, variance_reduction="sum")
    assert repr(module) == (
        "VICRegLoss(sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0, gamma=1.5, eps=0.001, "
        "variance_reduction=sum)"
    )
    z, z_prime = embeddings(6, 4, scale=0.5)
    expected = authors_loss(
        z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0, gamma=1.5, eps=1e-3,
        variance_reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(tuple(module(z, z_prime)), tuple(expected))
