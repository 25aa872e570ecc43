"""Encoders of waveforms, built of models of stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.models.waveform_encoder import (
    WaveformEncoder,
    save_waveform_encoder,
)

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": [16, 16, 16], "conv_kernel": [10, 8, 4], "conv_stride": [5, 4, 2],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.5, "mask_time_length": 2,
    "layerdrop": 0.5,
}  # fmt: skip
KINDS = ["wav2vec2", "hubert", "wavlm", "data2vec-audio", "wav2vec2-conformer"]
RECEPTIVE = 105  # 10 + 5 * (8 - 1) + 5 * 4 * (4 - 1)


def encoder_of(kind: str) -> WaveformEncoder:
    torch.manual_seed(0)
    return WaveformEncoder.create(kind, TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_draws_from_torch_alone_and_every_parameter_in_use_gets_a_gradient(
    kind: str,
) -> None:
    encoder, waveforms, outputs = encoder_of(kind), torch.randn(3, 1600), []
    for state in (0, 1):
        np.random.seed(state)  # noqa: NPY002
        torch.manual_seed(0)
        outputs.append(encoder(waveforms))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (3, encoder.num_features) == (3, 32)
    outputs[0].square().sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    assert "model.masked_spec_embed" in frozen
    unused = "pos_conv_embed" if kind == "wav2vec2-conformer" else "masked_spec_embed"
    assert all(unused in name for name in frozen - {"model.masked_spec_embed"}), frozen


@pytest.mark.parametrize("kind", KINDS)
def test_stock_loaders_and_the_configuration_give_the_same_features(
    kind: str, tmp_path: Path
) -> None:
    clip = np.sin(np.arange(1600, dtype=np.float32)) + np.float32(0.1)
    batch = WaveformColumn("sound", 8000, 1600).batch([clip], [0], 0, 0)
    encoder = encoder_of(kind).eval()
    described = json.loads(json.dumps(encoder.model.config.to_dict()))
    rebuilt = WaveformEncoder.from_config(described).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(batch), encoder(batch))
    save_waveform_encoder(encoder.to(torch.bfloat16), 8000, tmp_path)
    assert encoder.model.dtype == torch.bfloat16  # left as it was
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    extractor: Any = AutoFeatureExtractor.from_pretrained(tmp_path)
    inputs = extractor(clip, sampling_rate=8000, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.float()(batch)
        stock: Any = AutoModel.from_pretrained(tmp_path).eval()
        hidden = stock(**inputs).last_hidden_state
    torch.testing.assert_close(hidden.mean(1), expected, rtol=1e-4, atol=1e-4)


def test_pretrained_weights_are_those_of_the_files(tmp_path: Path) -> None:
    save_waveform_encoder(encoder_of("hubert"), 16_000, tmp_path)
    encoder = WaveformEncoder.create(str(tmp_path), {"hidden_dropout": 0.3}, pretrained=True)
    stock: Any = AutoModel.from_pretrained(tmp_path)
    theirs = stock.state_dict()
    assert all(torch.equal(value, theirs[k]) for k, value in encoder.model.state_dict().items())
    assert encoder.model.config.hidden_dropout == 0.3
    with pytest.raises(ValueError, match="must be whole, and 16 are missing"):
        WaveformEncoder.create(str(tmp_path), {"num_hidden_layers": 3}, pretrained=True)
    with pytest.raises(ValueError, match=r"^pretrained weights must be in a directory"):
        WaveformEncoder.create(str(tmp_path), {"hidden_size": 64}, pretrained=True)


def test_short_waveforms_and_other_models_are_refused_in_a_sentence(tmp_path: Path) -> None:
    encoder = encoder_of("wav2vec2")
    assert encoder.min_samples == RECEPTIVE
    with torch.no_grad():
        assert encoder(torch.randn(1, RECEPTIVE)).shape == (1, 32)
    with pytest.raises(ValueError, match=r"at least 105 samples, the receptive field .* got 104"):
        encoder(torch.randn(1, RECEPTIVE - 1))
    assert WaveformEncoder.create("wav2vec2", {"num_hidden_layers": 1}).min_samples == 400
    for kind in ("bert", "audio-spectrogram-transformer"):
        with pytest.raises(ValueError, match=r"^architecture must be an encoder of raw waveforms"):
            WaveformEncoder.create(kind)
    for name in ("no_such_model_type", str(tmp_path)):
        with pytest.raises(ValueError, match=r"^architecture must be a model type of transformers"):
            WaveformEncoder.create(name)
    with pytest.raises(ValueError, match="got the model type 'hubert'"):
        WaveformEncoder.create("hubert", TINY, pretrained=True)
    with pytest.raises(ValueError, match=r"^model_args must be fields of HubertConfig, got depth"):
        WaveformEncoder.create("hubert", {"depth": 1})
    with pytest.raises(ValueError, match=r"must make a HubertModel that can be built"):
        WaveformEncoder.create("hubert", {"hidden_size": 40})
