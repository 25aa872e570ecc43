"""Encoders of every kind, opened: their features must be those of the stock loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from encoders import resnet, vicreg, vit
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor, AutoModel

from vicreg_hf import VICRegModel
from vicreg_hf.benchmarks.data import photographs
from vicreg_hf.features.encode import encode_with
from vicreg_hf.features.encoders import Encoder, open_encoder

(SHOWN,) = photographs(1, 90, 70)


def features_of(encoder: Encoder) -> Tensor:
    image = encoder.prepare(tv.pil_to_tensor(SHOWN))
    return encode_with(encoder, image[None], torch.device("cpu"))


@pytest.mark.parametrize(("make", "width"), [(vit, 16), (resnet, 16)])
def test_transformers_models_are_pooled(
    make: Callable[[Path], Any], width: int, tmp_path: Path
) -> None:
    make(tmp_path)
    encoder = open_encoder(str(tmp_path))
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path)
    model: Any = AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = model(**processor(SHOWN, return_tensors="pt")).pooler_output.flatten(1)
    torch.testing.assert_close(features_of(encoder), expected)
    assert encoder.num_features == width == expected.shape[1]
    image = encoder.prepare(tv.pil_to_tensor(SHOWN))
    assert encoder.data_config["input_size"] == tuple(image.shape)


def test_a_pooler_that_a_file_does_not_hold_is_not_used(tmp_path: Path) -> None:
    # transformers would draw its weights at random, at each loading others
    model = vit(tmp_path, pooler=False)
    encoder = open_encoder(str(tmp_path))
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        tokens = model(**processor(SHOWN, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features_of(encoder), tokens[:, 0])
    moved = tmp_path.rename(tmp_path.with_name("moved"))  # which makes it no other encoder
    assert encoder.fingerprint() == open_encoder(str(moved)).fingerprint()


def test_encoders_are_found_in_runs_checkpoints_and_on_the_hub(tmp_path: Path) -> None:
    model = vicreg()
    model.save_pretrained(tmp_path / "run" / "encoder")
    model.config.save_pretrained(tmp_path / "step-1")
    save_file(model.state_dict(), tmp_path / "step-1" / "model.safetensors", {"format": "pt"})
    x = torch.randn(2, 3, 64, 64)
    for name in ("run", "run/encoder", "step-1"):
        encoder = open_encoder(str(tmp_path / name))
        with torch.no_grad():
            torch.testing.assert_close(encoder.module(x), model.encoder(x))
        assert not encoder.module.training
        assert encoder.num_features == model.num_features


def test_what_is_no_encoder_is_refused_with_the_place_that_was_looked_in(tmp_path: Path) -> None:
    kind = "an encoder of images that timm or AutoModel loads"
    for name, sentence in {
        "./run": "a directory that is there, or org/name", "of two words": "org/name",
        "org/run": f"{kind}.*'org/run', which is no directory here: ",
        str(tmp_path): f"{kind}.*{tmp_path.name}': ",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"model must be {sentence}"):
            open_encoder(name)


def test_a_directory_of_timm_is_opened_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", num_classes=7).eval()
    model.pretrained_cfg |= {"crop_pct": 0.9, "mean": (0.4, 0.5, 0.6)}
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    view: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        x = model.forward_features(view(SHOWN)[None])
        expected = model.forward_head(x, pre_logits=True)
    torch.testing.assert_close(features_of(open_encoder(str(tmp_path))), expected)


def test_a_fingerprint_tells_weights_architecture_and_preprocessing_apart(tmp_path: Path) -> None:
    def fingerprint(model: VICRegModel, **cfg: Any) -> str:
        assert model.config.pretrained_cfg is not None
        model.config.pretrained_cfg |= cfg
        model.save_pretrained(tmp_path)
        return open_encoder(str(tmp_path)).fingerprint()

    first = fingerprint(vicreg())
    assert fingerprint(vicreg()) == first
    other = vicreg()
    with torch.no_grad():
        next(other.encoder.parameters()).view(-1)[0] += 1e-3
    changed = [
        fingerprint(other),
        fingerprint(vicreg(), mean=[0.4, 0.4, 0.4]),
        fingerprint(vicreg(), crop_pct=0.5),
        fingerprint(vicreg(), interpolation="bicubic"),
        fingerprint(vicreg(), input_size=[3, 48, 48]),
        fingerprint(vicreg(output_stride=16)),
    ]
    assert len({first, *changed}) == 7
