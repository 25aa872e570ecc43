"""Feature maps as encoders give them, their colours, and matches in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import resnet, vicreg, vit
from sklearn.decomposition import PCA
from torch import Tensor

from vicreg_hf.features.encoders import open_encoder
from vicreg_hf.features.maps import (
    map_encoder,
    maps_of,
    mutual_matches,
    picture_of_matches,
    principal_components,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_maps_are_flattened_by_rows_at_any_size(tmp_path: Path) -> None:
    vicreg().save_pretrained(tmp_path, include_expander=False)
    encoder = open_encoder(str(tmp_path))
    mapped = map_encoder(encoder, (64, 96))
    assert (mapped.map_size, mapped.num_features) == ((2, 3), 6 * 96)
    model: Any = encoder.module
    x = noise(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_features(x).permute(0, 2, 3, 1)
        torch.testing.assert_close(mapped.module(x).view(2, 2, 3, 96), expected)
    assert mapped.prepare(torch.zeros(3, 50, 70, dtype=torch.uint8)).shape == (3, 64, 96)
    assert mapped.fingerprint() != encoder.fingerprint()
    assert map_encoder(encoder).fingerprint() != mapped.fingerprint()


def test_models_of_transformers_have_maps_too(tmp_path: Path) -> None:
    model = vit(tmp_path / "vit")
    mapped = map_encoder(open_encoder(str(tmp_path / "vit")), (32, 48))
    x = noise(1, 3, 32, 48)
    with torch.no_grad():
        tokens = model(x, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    assert mapped.map_size == (2, 3)
    torch.testing.assert_close(mapped.module(x), tokens.flatten(1))
    resnet(tmp_path / "resnet")
    assert map_encoder(open_encoder(str(tmp_path / "resnet"))).map_size == (8, 8)


def test_colours_are_the_first_components_of_all_images_together() -> None:
    x = noise(3, 4, 5, 6).double()
    x[..., 0] += 4 * torch.arange(4.0)[:, None].double()
    found = principal_components(x)
    assert found.shape == (3, 4, 5, 3)
    parts = PCA(3).fit_transform(x.flatten(0, 2).numpy())
    for k in range(3):
        r = np.corrcoef(parts[:, k], found.flatten(0, 2)[:, k].numpy())[0, 1]
        assert abs(r) > 0.99
    assert torch.equal(found, principal_components(x))
    flat = principal_components(torch.ones(1, 4, 4, 2))
    assert torch.equal(flat, torch.full_like(flat, 128))  # nothing differs


def test_matches_are_positions_that_are_each_others_nearest(tmp_path: Path) -> None:
    first = noise(4, 5, 32)
    second = first.flip(1) + 0.01 * noise(4, 5, 32, seed=1)  # mirrored
    found = mutual_matches(first, second, 12)
    assert len(found.first) == 12
    assert (found.similarity.diff() <= 0).all()
    assert torch.equal(found.first // 5, found.second // 5)
    assert torch.equal(found.first % 5, 4 - found.second % 5)
    view = torch.zeros(3, 30, 30, dtype=torch.uint8)
    drawn = np.array(picture_of_matches(view, view, first, second))
    assert drawn.shape == (240, 488, 3)
    assert (np.ptp(drawn.astype(int), axis=2) > 100).sum() > 1000  # coloured lines
    model = vicreg().encoder.train()
    maps = maps_of(
        model, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), mean=[0.5] * 3, std=[0.5] * 3,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert maps.shape == (2, 2, 2, 96)
    assert model.training
    with pytest.raises(ValueError, match="must take images of 1 x 1"):
        map_encoder(open_encoder(str(_vit(tmp_path))), (1, 1))


def _vit(folder: Path) -> Path:
    vicreg(architecture="test_vit").save_pretrained(folder / "v", include_expander=False)
    return folder / "v"
