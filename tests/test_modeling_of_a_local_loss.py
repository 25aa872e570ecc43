"""A VICRegModel with a local loss: its pieces, what it saves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import same_state
from torch import Tensor
from transformers import AutoModel

from vicreg_hf import (
    TwoViews,
    VICRegConfig,
    VICRegModel,
    ViewCollator,
    local_loss,
    multi_view_loss,
    vicreg_loss,
)
from vicreg_hf.models.feature_map import feature_map

VIT = {"img_size": 32, "patch_size": 8, "dynamic_img_size": True}


def model(name: str = "test_convnext", model_args: Any = None, **settings: Any) -> VICRegModel:
    torch.manual_seed(0)
    settings = {"local_weight": 0.25, "local_matches": 3, "local_view_matches": 2,
                "local_expander_dims": [12, 10]} | settings  # fmt: skip
    return VICRegModel(
        VICRegConfig(architecture=name, model_args=model_args, expander_dims=[16, 16], **settings)
    )


def views(sides: list[int], images: int = 4) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(images, 3, side, side, generator=generator) for side in sides]
    places = 60 * torch.rand(images, len(sides), 5, generator=generator) + 10
    places[..., 4] = torch.randint(2, (images, len(sides)), generator=generator)
    return made, places


@pytest.mark.parametrize(("name", "model_args"), [
    ("test_convnext", None), ("test_resnet", None), ("test_mambaout", None), ("test_vit", VIT),
])  # fmt: skip
@pytest.mark.parametrize("sides", [[64, 64], [64, 64, 32]])
def test_the_loss_is_the_share_of_vicregs_and_the_share_of_the_local_one(
    name: str, model_args: Any, sides: list[int]
) -> None:
    made, (images, places) = model(name, model_args).double().train(), views(sides)
    assert made.local_expander is not None
    x = [view.double() for view in images]
    maps = []
    with torch.no_grad():
        for view in x:
            features: Any = made.encoder.forward_features(view)  # pyright: ignore
            cells = feature_map(made.encoder, features, (view.shape[2], view.shape[3]))
            rows = torch.cat([row for image in cells for row in image.flatten(1).T.split(1)])
            maps.append(made.local_expander(rows).view(len(cells), *cells.shape[2:], 10))
        output = made(*x[:2], places.double(), local_views=x[2:])
    z, pairs = output.embeddings, [(0, 1, 3), (0, 2, 2), (1, 2, 2)][: 2 * len(sides) - 3]
    whole = vicreg_loss(*z) if len(z) == 2 else multi_view_loss(z[:2], z[2:])
    local = [
        local_loss(maps[i], maps[j], places[:, i].double(), places[:, j].double(), matches=matches)
        for i, j, matches in pairs
    ]
    location, feature = (
        torch.stack([getattr(each, part) for each in local]).mean()
        for part in ("location", "feature")
    )
    assert list(output.scalars) == list(made.term_names)
    expected = [0.75 * whole.loss + 0.25 * (location + feature), *whole[1:], location, feature]
    torch.testing.assert_close(list(output.scalars.values()), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.loss, expected[0], rtol=1e-9, atol=0)


def test_without_a_local_weight_a_model_is_as_ever_and_all_of_it_begins_as_with_one() -> None:
    plain, local = model(local_weight=0.0), model()
    assert plain.local_expander is None
    others = {k: v for k, v in local.state_dict().items() if not k.startswith("local_expander.")}
    assert plain.state_dict().keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in plain.state_dict().items())
    (x, x_prime), places = views([64, 64])
    outputs = [plain(x, x_prime), plain(x, x_prime, places)]
    assert all(output.feature_map is None and output.terms is None for output in outputs)
    images = torch.randint(256, (2, 3, 70, 70), dtype=torch.uint8)
    assert len(TwoViews.for_model(plain)(images)) == 2
    assert len(TwoViews.for_model(local)(images)) == 3


def test_the_local_expander_stands_beside_the_expander_and_not_in_a_published_encoder(
    tmp_path: Path,
) -> None:
    made = model()
    made.save_pretrained(tmp_path / "whole")
    loaded = VICRegModel.from_pretrained(tmp_path / "whole").train()
    assert same_state(loaded, made)
    assert loaded.config.local_weight == 0.25
    made.save_pretrained(tmp_path / "whole", include_expander=False)
    model(local_weight=0.0).save_pretrained(tmp_path / "plain", include_expander=False)
    files = [
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "plain")
    ]
    assert files[0] == files[1] == ["config.json", "model.safetensors"]
    configs = [json.loads((tmp_path / name / "config.json").read_text())
               for name in ("whole", "plain")]  # fmt: skip
    assert configs[0] == configs[1]
    assert not any("local" in key for key in configs[0]["vicreg"])
    assert AutoModel.from_pretrained(tmp_path / "whole") is not None
    assert VICRegModel.from_pretrained(tmp_path / "whole").local_expander is None


def test_a_collator_of_transformers_trainer_gives_what_the_model_takes() -> None:
    made = model()
    made.set_image_size(64)
    samples = [{"image": torch.full((3, 70, 80), 9 * row).byte(), "row": row} for row in range(4)]
    batch = ViewCollator(TwoViews.for_model(made))(samples)
    assert batch.keys() == {"pixel_values", "pixel_values_prime", "places"}
    assert made(**batch).scalars["local_location"] > 0


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"local_weight": 1.0}, "local_weight must be below 1, got 1.0"),
    ({"local_weight": -0.1}, "local_weight must be a finite number of at least 0"),
    ({"local_matches": 0}, "local_matches must be a whole number of at least 1, got 0"),
    ({"local_view_matches": 1.5}, "local_view_matches must be a whole number"),
    ({"local_expander_dims": "8-x"}, "local_expander_dims must be positive widths"),
    ({"weights": "separate"}, "local_weight must be 0 with a second branch.* got 0.25"),
    ({"prime": {"modality": "embedding", "num_features": 4}}, "0 with a second branch"),
])  # fmt: skip
def test_other_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model(**settings)


def test_a_call_that_cannot_have_a_local_loss_is_refused() -> None:
    made, ((x, x_prime), places) = model(), views([64, 64])
    with pytest.raises(ValueError, match=r"places must be \(images, 2 views, 5\) .* got NoneType"):
        made(x, x_prime)
    with pytest.raises(ValueError, match=r"places must be .* got shape \(4, 1, 5\)"):
        made(x, x_prime, places[:, :1])
    made.loss = lambda z, z_prime: (z - z_prime).square().mean()
    with pytest.raises(ValueError, match="loss must be VICReg's own where local_weight"):
        made(x, x_prime, places)
    assert made(x).loss is None  # nothing is compared
