"""Embeddings and settings that the loss takes, and those it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from authors_loss import authors_loss, embeddings

from vicreg_hf import VICRegLoss, vicreg_loss


@pytest.mark.parametrize(
    ("z", "z_prime", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), r"\(4, 3\) and \(4, 2\)"),
        (torch.zeros(4, 3), torch.zeros(3, 3), r"\(4, 3\) and \(3, 3\)"),
        (torch.zeros(4), torch.zeros(4), r"\(rows, dimensions\)"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), r"\(rows, dimensions\)"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 3).long(), "floating point"),
        (torch.zeros(4, 3), torch.zeros(4, 3).long(), "floating point"),
        (torch.zeros(1, 3), torch.zeros(1, 3), "at least 2 rows over all processes, got 1"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "at least 2 rows over all processes, got 0"),
        (torch.zeros(4, 0), torch.zeros(4, 0), r"at least 1 dimension, got shape \(4, 0\)"),
        (np.zeros((4, 3)), torch.zeros(4, 3), "must be tensors, got ndarray and Tensor; convert"),
        ([[0.0], [1.0]], None, "must be tensors, got list and NoneType; convert arrays"),
        (torch.zeros(4, 3), torch.zeros(4, 3, device="meta"), "same device, got cpu and meta"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(z: Any, z_prime: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vicreg_loss(z, z_prime)


def test_an_unknown_variance_reduction_is_refused() -> None:
    reduction: Any = "median"
    with pytest.raises(ValueError, match="mean or sum, got 'median'"):
        vicreg_loss(*embeddings(4, 3), variance_reduction=reduction)
    with pytest.raises(ValueError, match="mean or sum, got 'median'"):
        VICRegLoss(variance_reduction=reduction)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True, torch.ones(())])
@pytest.mark.parametrize("name", ["sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps"])
def test_weights_and_constants_that_cannot_be_are_refused(name: str, value: Any) -> None:
    message = f"^{name} must be a finite number of at least 0, got {re.escape(repr(value))}.$"
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=message):
        VICRegLoss(**settings)
    with pytest.raises(ValueError, match=message):
        vicreg_loss(*embeddings(4, 3), **settings)


def test_numbers_may_be_integers_and_those_of_numpy() -> None:
    z, z_prime = embeddings(6, 4)
    given: Any = {"sim_coeff": np.float32(2), "std_coeff": np.int64(3), "cov_coeff": 5}
    expected = vicreg_loss(z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0)
    assert torch.equal(vicreg_loss(z, z_prime, **given).loss, expected.loss)


def test_the_module_shows_its_settings() -> None:
    assert repr(VICRegLoss(2.0, variance_reduction="sum")) == (
        "VICRegLoss(sim_coeff=2.0, std_coeff=25.0, cov_coeff=1.0, gamma=1.0, eps=0.0001, "
        "variance_reduction=sum)"
    )


def test_the_module_computes_the_function_with_its_settings() -> None:
    z, z_prime = embeddings(6, 4, scale=0.5)
    module = VICRegLoss(2.0, 3.0, 5.0, gamma=1.5, eps=1e-3, variance_reduction="sum")
    expected = authors_loss(
        z, z_prime, sim_coeff=2.0, std_coeff=3.0, cov_coeff=5.0, gamma=1.5, eps=1e-3,
        variance_reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(tuple(module(z, z_prime)), tuple(expected))
