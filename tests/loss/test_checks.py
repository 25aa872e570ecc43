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
        ([Z[0], Z[0]], r"\(rows, dimensions\), got \(3,\)"),
        ([Z.long(), Z], "floating point, got torch.int64 and torch.float32; convert"),
        ([Z[:1], Z[:1]], "at least 2 rows over all processes, got 1"),
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


def test_views_that_are_no_lists_or_too_few_are_refused() -> None:
    one, no_list, local = [Z], Z, ([Z, Z], Z)
    for views, message in (
        ((one, [Z, Z]), "^global_views must hold at least 2 views, got 1"),
        ((no_list, no_list), r"^global_views must be a list .*, got Tensor of shape \(4, 3\)\.$"),
        (local, r"^local_views must be a list of tensors .*, got Tensor of shape \(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_view_loss(*views)  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sim_coeff", value) for value in (-1.0, math.nan, math.inf, "1", None, True)),
        *((name, -1.0) for name in ("std_coeff", "cov_coeff", "gamma", "eps")),
        ("variance_reduction", "median"),
    ],
)
def test_coefficients_that_cannot_be_are_refused(name: str, value: Any) -> None:
    rule = "mean or sum" if isinstance(value, str) and value != "1" else "a finite number of .* 0"
    message = f"^{name} must be {rule}, got {re.escape(repr(value))}.$"
    settings: dict[str, Any] = {name: value}
    losses = [
        lambda: VICRegLoss(**settings),
        lambda: vicreg_loss(Z, Z, **settings),
        lambda: multi_view_loss([Z, Z], **settings),
    ]
    if name in ("gamma", "eps"):
        losses.append(lambda: variance_term(Z, **settings))
    for refused in losses:
        with pytest.raises(ValueError, match=message):
            refused()


def test_the_module_shows_its_settings_and_computes_with_them() -> None:
    numbers: Any = np.float32(2), np.int64(3), 5
    module = VICRegLoss(*numbers, gamma=1.5, eps=1e-3, variance_reduction="sum")
    assert "eps=0.001, variance_reduction=sum)" in repr(module)
    z, z_prime = embeddings(6, 4, scale=0.5)
    expected = authors_loss(
        z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0, gamma=1.5, eps=1e-3,
        variance_reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(tuple(module(z, z_prime)), tuple(expected))
