"""Two branches that share nothing: what they compute, what is written, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import same_state
from torch import Tensor
from transformers import AutoModel, BertConfig, T5Config, Wav2Vec2Config

from vicreg_hf import VICRegConfig, VICRegModel, vicreg_loss
from vicreg_hf.hub.export import export_encoder
from vicreg_hf.loss.multi_view import multi_view_loss
from vicreg_hf.modeling_vicreg import VICRegOutput
from vicreg_hf.models.branch import BranchInput
from vicreg_hf.training.gradcache import backward_in_chunks

ROWS = 12
TEXT = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
SOUND: Any = Wav2Vec2Config(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,  # pyright: ignore[reportCallIssue]
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, hidden_dropout=0.0,
    attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0,
)  # fmt: skip
T5 = T5Config(
    vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
)
SECOND: dict[str, dict[str, Any]] = {
    "separate": {"weights": "separate"},
    "another architecture": {
        "prime": {
            "architecture": "test_vit", "model_args": {"img_size": 48, "patch_size": 8},
            "expander_dims": [20, 16],
        }
    },
    "text": {"prime": {"modality": "text", "encoder_config": TEXT.to_dict()}},
    "text, tied weights": {"prime": {"modality": "text", "encoder_config": T5.to_dict()}},
    "waveforms": {"prime": {"modality": "audio", "encoder_config": SOUND.to_dict()}},
    "spectrograms": {
        "prime": {
            "modality": "audio", "architecture": "test_resnet", "model_args": {"in_chans": 1}
        }
    },
    "embedding": {"prime": {"modality": "embedding", "num_features": 6}},
}  # fmt: skip


def build(kind: str) -> VICRegModel:
    torch.manual_seed(0)
    config = VICRegConfig(architecture="test_resnet", expander_dims=[24, 16], **SECOND[kind])
    return VICRegModel(config).train()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taken_by(kind: str) -> BranchInput:
    """What the second branch takes of each sample."""
    if kind.startswith("text"):
        tokens = torch.randint(50, (ROWS, 7), generator=torch.Generator().manual_seed(2))
        mask = (torch.arange(7) < torch.arange(ROWS)[:, None] % 6 + 2).long()
        return {"input_ids": tokens, "attention_mask": mask}
    shapes = {
        "separate": (3, 32, 32), "another architecture": (3, 48, 48), "waveforms": (2000,),
        "spectrograms": (1, 32, 32), "embedding": (6,),
    }  # fmt: skip
    return random(ROWS, *shapes[kind], seed=3)


def gradients(model: VICRegModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", SECOND)
def test_each_view_goes_to_its_own_branch_and_reaches_all_its_parameters(kind: str) -> None:
    model, x, other = build(kind), random(ROWS, 3, 32, 32), taken_by(kind)
    output = model(x, other)
    output.loss.backward()
    assert gradients(model).keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert model.prime is not None
    z = model.expander(model.backbone(x))
    y_prime = model.prime.represent(other)
    z_prime = model.prime.expander(y_prime)
    torch.testing.assert_close(output.loss, vicreg_loss(z, z_prime).loss)
    torch.testing.assert_close(output.embeddings[1], z_prime)
    torch.testing.assert_close(model(pixel_values_prime=other).pooler_output, y_prime)
    assert output.embeddings[0].shape == output.embeddings[1].shape == (ROWS, 16)


@pytest.mark.parametrize("kind", SECOND)
def test_a_model_of_two_branches_comes_back_whole(kind: str, tmp_path: Path) -> None:
    model, x, other = build(kind).eval(), random(ROWS, 3, 32, 32), taken_by(kind)
    model.save_pretrained(tmp_path)
    loaded: Any = VICRegModel.from_pretrained(tmp_path, output_loading_info=True)
    again, found = loaded
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    prime = json.loads(json.dumps(model.config.prime))
    assert (again.config.weights, again.config.prime) == ("separate", prime)
    assert same_state(again, model)
    torch.testing.assert_close(again.eval()(x, other).loss, model(x, other).loss)


def test_weights_that_are_separate_begin_apart_and_those_shared_are_one() -> None:
    model = build("separate")
    assert model.prime is not None
    ours, others = model.backbone.state_dict(), model.prime.backbone.state_dict()
    assert ours.keys() == others.keys()
    assert any(not torch.equal(ours[name], others[name]) for name in ours)
    assert VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[4])).prime is None


def test_each_encoder_is_published_alone_and_loads_with_the_stock_loaders(tmp_path: Path) -> None:
    model = build("another architecture").eval()
    assert model.prime is not None
    one, other = tmp_path / "one", tmp_path / "other"
    export_encoder(model, one)
    export_encoder(model.second_model(), other, include_expander=True)
    assert not {"prime", "weights"} & json.loads((one / "config.json").read_text())["vicreg"].keys()
    assert {file.name for file in one.iterdir()} == {"config.json", "model.safetensors"}
    assert VICRegModel.from_pretrained(one).prime is None
    x, x_prime = random(2, 3, 32, 32), random(2, 3, 48, 48)
    y_prime = model.prime.represent(x_prime)
    for place, inputs, y in ((one, x, model.encoder(x)), (other, x_prime, y_prime)):
        stock: Any = AutoModel.from_pretrained(place)
        torch.testing.assert_close(stock(inputs).pooler_output, y)
    again = VICRegModel.from_pretrained(other).eval()
    z_prime = model.prime.expander(y_prime)
    torch.testing.assert_close(again.expander(again.encoder(x_prime)), z_prime)


SMOOTH: dict[str, Any] = {
    "architecture": "test_vit", "model_args": {"img_size": 32, "drop_rate": 0.4},
    "expander_dims": [16],
}  # fmt: skip
"""A model without ReLU, which no rounding sets one way or the other."""


def assert_chunks_give_one_pass(
    settings: dict[str, Any], *views: Any, chunk_size: int, **more: list[Tensor]
) -> VICRegOutput:
    """Compare loss and gradients in float32, in which encoders of other modalities end."""
    torch.manual_seed(0)
    whole = VICRegModel(VICRegConfig(**SMOOTH | settings)).train(chunk_size == ROWS)
    model = copy.deepcopy(whole)
    torch.manual_seed(5)  # dropout takes the same numbers where there is one chunk
    expected = whole(*views, **more)
    expected.loss.backward()
    torch.manual_seed(5)
    output = backward_in_chunks(model, *views, chunk_size=chunk_size, **more)
    assert output.keys() == expected.keys() - {"last_hidden_state"}
    for name in output.keys() - {"embeddings"}:
        torch.testing.assert_close(output[name], expected[name].detach())
        assert not output[name].requires_grad
    for z, expected_z in zip(output["embeddings"], expected["embeddings"], strict=True):
        torch.testing.assert_close(z, expected_z.detach())
        assert not z.requires_grad
    assert gradients(model).keys() == gradients(whole).keys()
    for name, gradient in gradients(whole).items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=0, atol=atol, msg=name)
    return expected


@pytest.mark.parametrize("kind", ["separate", "text", "waveforms", "embedding"])
@pytest.mark.parametrize("chunk_size", [5, 12])
def test_chunks_give_the_gradients_of_one_pass(kind: str, chunk_size: int) -> None:
    x, settings = random(ROWS, 3, 32, 32), SECOND[kind]
    if kind == "text":
        fields = TEXT.to_dict() | {"hidden_dropout_prob": 0.4}
        settings = {"prime": {"modality": "text", "encoder_config": fields}}
    assert_chunks_give_one_pass(settings, x, taken_by(kind), chunk_size=chunk_size)


@pytest.mark.parametrize(("weights", "chunk_size"), [("shared", 1), ("separate", 20)])
def test_further_views_go_to_the_first_branch_in_chunks_too(weights: str, chunk_size: int) -> None:
    x, x_prime, further, *local = (random(ROWS, 3, 32, 32, seed=seed) for seed in range(5))
    expected = assert_chunks_give_one_pass(
        {"weights": weights}, x, x_prime, chunk_size=chunk_size, further_views=[further],
        local_views=local,
    )  # fmt: skip
    assert expected.embeddings is not None
    assert len(expected.embeddings) == 5
    loss = multi_view_loss(expected.embeddings[:3], expected.embeddings[3:]).loss
    torch.testing.assert_close(expected.loss, loss)
    torch.manual_seed(0)
    model = VICRegModel(VICRegConfig(**SMOOTH, weights=weights)).eval()
    second = model.branches[-1]
    torch.testing.assert_close(expected.embeddings[1], second.expander(second.backbone(x_prime)))
    torch.testing.assert_close(expected.embeddings[4], model.expander(model.backbone(local[1])))


def test_a_second_branch_of_the_same_architecture_takes_over_how_it_sees() -> None:
    first = VICRegModel(VICRegConfig(architecture="test_resnet.r160_in1k", expander_dims=[8]))
    cfg = dict(first.config.pretrained_cfg or {}) | {"mean": [0.1] * 3, "input_size": [3, 32, 32]}
    config = VICRegConfig(
        architecture="test_resnet.r160_in1k", expander_dims=[8], pretrained_cfg=cfg,
        model_args={"num_classes": 5}, weights="separate",
    )  # fmt: skip
    prime = config.prime
    assert prime is not None
    assert (prime["architecture"], prime["model_args"]) == ("test_resnet", None)
    assert prime["pretrained_cfg"] == cfg
    assert prime["pretrained_cfg"] is not config.pretrained_cfg


def test_what_cannot_be_encoded_or_loaded_is_refused(tmp_path: Path) -> None:
    TEXT.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be in a training checkpoint, .* got 'bert'"):
        VICRegModel.from_pretrained(tmp_path)
    model, x = build("text"), random(ROWS, 3, 32, 32)
    with pytest.raises(ValueError, match="needs pixel_values or pixel_values_prime, got neither"):
        model()
    with pytest.raises(ValueError, match="compared with two views, got no pixel_values_prime"):
        model(x, local_views=[x])
    with pytest.raises(ValueError, match="needs a second branch with an encoder of timm"):
        model.second_model()
