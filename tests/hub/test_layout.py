"""The files of a saved model, and loading them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import config, same_state, trained
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from vicreg_hf import VICRegModel

ENCODER = {"config.json", "model.safetensors"}
TRAINING = {"expander.safetensors", "vicreg.safetensors.index.json"}


def test_saving_writes_these_files_with_timms_names_in_float32(tmp_path: Path) -> None:
    model = trained().bfloat16()
    model.save_pretrained(tmp_path / "absent", is_main_process=False)
    assert not (tmp_path / "absent").exists()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == ENCODER | TRAINING
    model.save_pretrained(tmp_path, include_expander=False)  # and removes an older one
    assert {path.name for path in tmp_path.iterdir()} == ENCODER
    saved, expected = load_file(tmp_path / "model.safetensors"), model.encoder.state_dict()
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, expected[name].to(value.dtype))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "timm_wrapper"
    # where the registry's weights came from, which these are not
    assert not {"tag", "hf_hub_id", "url", "license"} & written["pretrained_cfg"].keys()


def test_the_arguments_of_accelerate_and_trainer_change_nothing(tmp_path: Path) -> None:
    model = trained()
    arguments: dict[str, dict[str, Any]] = {
        "plain": {},
        "accelerate": {"save_function": torch.save, "state_dict": model.state_dict()},
        "trainer": {"safe_serialization": True, "max_shard_size": "5GB", "push_to_hub": False},
    }
    for name, more in arguments.items():
        model.save_pretrained(tmp_path / name, is_main_process=True, **more)
        for file in ("model.safetensors", "expander.safetensors", "config.json"):
            expected = (tmp_path / "plain" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == expected
    with pytest.raises(ValueError, match=r"takes?, got variant; leave it out"):
        model.save_pretrained(tmp_path / "other", variant="fp16")
    assert not (tmp_path / "other").exists()


def load(path: Path) -> tuple[VICRegModel, str]:
    """The model, and the warnings that transformers logs."""
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as captured:
        model = VICRegModel.from_pretrained(path)
    return model, captured.out


def test_a_model_loads_and_warns_if_it_has_no_expander(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {
        "expander_dims": [5, 3], "sim_coeff": 2.0, "std_coeff": 3.0, "cov_coeff": 5.0,
        "gamma": 1.5, "eps": 1e-3, "variance_reduction": "sum",
    }  # fmt: skip
    expected = trained(**settings)
    expected.save_pretrained(tmp_path)
    model, warning = load(tmp_path)
    assert warning == ""
    assert same_state(model, expected)
    assert not model.training
    assert {name: getattr(model.config, name) for name in settings} == settings
    for file in TRAINING:
        (tmp_path / file).unlink()
    bare, warning = load(tmp_path)
    assert same_state(bare.encoder, expected.encoder)
    assert "expander" in warning
    assert "newly initialized" in warning
    assert "backbone" not in warning
    linear, norm = bare.expander[0], bare.expander.state_dict()
    assert isinstance(linear, nn.Linear)
    bound = linear.in_features**-0.5  # as torch initialises linear layers
    assert 0.5 * bound < float(linear.weight.detach().abs().max()) <= bound
    assert torch.equal(norm["1.weight"], torch.ones(5))
    assert torch.equal(norm["1.running_var"], torch.ones(5))


@pytest.mark.parametrize("architecture", ["test_resnet", "eva02_tiny_patch14_224", "test_nfnet"])
def test_a_training_checkpoint_loads_through_auto_model(architecture: str, tmp_path: Path) -> None:
    expected = trained(architecture)
    PreTrainedModel.save_pretrained(expected, tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is VICRegModel
    assert same_state(model, expected)


def test_images_of_other_than_three_channels_round_trip(tmp_path: Path) -> None:
    expected, x = trained(model_args={"in_chans": 4}), torch.randn(2, 4, 32, 32)
    expected.save_pretrained(tmp_path)
    model = VICRegModel.from_pretrained(tmp_path)
    stock_model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x).pooler_output, expected(x).pooler_output)
        torch.testing.assert_close(stock_model(x), expected(x).pooler_output)


def test_weights_of_an_encoder_alone_are_refused_by_the_whole_model() -> None:
    model = trained()
    weights = model.encoder.state_dict()
    for strict in (True, False):
        with pytest.raises(ValueError, match="backbone and expander, got the weights of a publish"):
            VICRegModel(config()).load_state_dict(weights, strict=strict)
    other = VICRegModel(config())
    other.load_state_dict(model.state_dict())
    assert same_state(other, model)
