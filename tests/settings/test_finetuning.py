"""How a classifier is trained: the authors' settings and their schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from vicreg_hf.settings.finetuning import LINEAR, ONE_PERCENT, TEN_PERCENT, FinetuneSettings


def test_settings_are_the_authors() -> None:
    common = {"batch_size": 256, "scale": (0.08, 1.0), "flip": 0.5}
    linear = {"epochs": 100, "lr_head": 0.02, "lr_backbone": 0.0, "weight_decay": 1e-6}
    few = {"epochs": 20, "weight_decay": 0.0}
    for settings, expected in (
        (LINEAR, linear),
        (ONE_PERCENT, few | {"lr_backbone": 0.03, "lr_head": 0.08}),
        (TEN_PERCENT, few | {"lr_backbone": 0.01, "lr_head": 0.1}),
    ):
        for name, value in (common | expected).items():
            assert getattr(settings, name) == value


@pytest.mark.parametrize("settings", [LINEAR, TEN_PERCENT], ids=["100", "20"])
def test_learning_rates_are_those_of_torchs_scheduler(settings: FinetuneSettings) -> None:
    head, backbone = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [
        {"params": [head], "lr": settings.lr_head},
        {"params": [backbone], "lr": settings.lr_backbone},
    ]
    optimizer = torch.optim.SGD(groups, 0)
    scheduler = CosineAnnealingLR(optimizer, settings.epochs)
    for epoch in range(settings.epochs):
        expected = [group["lr"] for group in optimizer.param_groups]
        assert settings.learning_rates(epoch) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_setting_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be two positive numbers"):
        FinetuneSettings(scale=(0.5, 0.1))
    with pytest.raises(ValueError, match="flip must be a number between 0 and 1, got"):
        FinetuneSettings(flip=2.0)
