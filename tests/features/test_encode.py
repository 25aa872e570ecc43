"""Batches of images become features in one way, whoever encodes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vicreg_hf.features.encode import check_finite_features, encode, encode_with, extract_features
from vicreg_hf.features.encoders import Encoder

MEAN, STD, CPU = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), torch.device("cpu")


def test_bytes_and_normalised_images_give_the_same_features() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    centre, width = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    normalised = (images / 255 - centre) / width
    with torch.no_grad():
        expected = module.eval()(normalised)
    given: Any = {"mean": MEAN, "std": STD, "device": CPU}
    for x in (images, normalised):
        torch.testing.assert_close(encode(module, x, **given), expected)
    encoder = Encoder(module, 4, lambda image: image, {"mean": MEAN, "std": STD}, {})
    torch.testing.assert_close(encode_with(encoder, images, CPU), expected)
    found = extract_features(module.train(), images.split(4), mean=MEAN, std=STD)
    torch.testing.assert_close(found, expected)
    assert module.training  # as it was


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([nn.Flatten(), nn.Linear(12, 2)], "must give finite features, and some are"),
        ([nn.Conv2d(3, 2, 1)], r"must pool to shape .*, got \(4, 2, 2, 2\)"),
    ],
)
def test_features_that_cannot_be_used_are_refused(layers: list[Any], sentence: str) -> None:
    nn.init.constant_(layers[-1].weight, torch.inf)
    config = {"input_size": (3, 2, 2), "mean": (0,) * 3, "std": (1,) * 3}
    encoder = Encoder(nn.Sequential(*layers), 2, lambda image: image, config, {})
    with pytest.raises(ValueError, match=sentence):
        check_finite_features(encode_with(encoder, torch.ones(4, 3, 2, 2, dtype=torch.uint8), CPU))
