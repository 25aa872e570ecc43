"""Encoders of text and of waveforms, built of models of stock transformers, and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from paired import word_tokenizer, write_text_encoder
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.tokenizers import check_tokenizer, load_tokenizer
from vicreg_hf.models.waveform_encoder import WaveformEncoder, save_waveform_encoder

TOKENIZER = word_tokenizer()
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT_LIKE: dict[str, Any] = TINY | {
    "vocab_size": len(TOKENIZER), "intermediate_size": 48, "max_position_embeddings": 40,
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 2,
    "eos_token_id": 3,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2,
    "num_heads": 2, "pad_token_id": 0, "eos_token_id": 3,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_layerdrop": 0.5, "bos_token_id": 2, "eos_token_id": 3,
    "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": 3,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "bert": BERT_LIKE, "roberta": BERT_LIKE, "gpt2": GPT2, "t5": T5, "bart": BART,
    "llama": BERT_LIKE | {"num_key_value_heads": 2}, "clip": BERT_LIKE, "siglip": BERT_LIKE,
}  # fmt: skip
CONVOLVED: dict[str, Any] = TINY | {
    "intermediate_size": 48, "conv_dim": [16, 16, 16], "conv_kernel": [10, 8, 4],
    "conv_stride": [5, 4, 2], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.5, "mask_time_length": 2,
    "layerdrop": 0.5,
}  # fmt: skip
RECEPTIVE = 105  # 10 + 5 * (8 - 1) + 5 * 4 * (4 - 1)
SOUND = ["wav2vec2", "hubert", "wavlm", "data2vec-audio", "wav2vec2-conformer"]
UNUSED = {"siglip": "head", "bart": "decoder", "llama": "embed"}
"""Part of the names of parameters that features do not depend on; in other texts' models pooler."""
CAPTIONS = ["a small red circle at the top left", "a large blue cross", "the middle"]
CLIP = np.sin(np.arange(1600, dtype=np.float32)) + np.float32(0.1)


def encoder_of(kind: str) -> TextEncoder | WaveformEncoder:
    torch.manual_seed(0)
    if kind in SOUND:
        return WaveformEncoder.create(kind, CONVOLVED)
    return TextEncoder.create(kind, TEXT[kind])


def batch_of(kind: str) -> Any:
    if kind in SOUND:
        return WaveformColumn("sound", 8000, 1600).batch([CLIP] * 3, [0, 1, 2], 0, 0)
    return TextColumn("caption", TOKENIZER).batch([(text,) for text in CAPTIONS], range(3), 0, 0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("kind", [*TEXT, *SOUND])
def test_every_parameter_in_use_gets_a_gradient_and_torch_alone_draws(kind: str) -> None:
    outputs = []
    with torch.no_grad():  # which it is built under and not trained under
        encoder = encoder_of(kind)
    for state in (0, 1):
        np.random.seed(state)  # noqa: NPY002
        torch.manual_seed(0)
        outputs.append(encoder(batch_of(kind)))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (3, encoder.num_features) == (3, 32)
    outputs[0].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    unused = "embed" if kind in SOUND else UNUSED.get(kind, "pooler")
    assert all(unused in name for name in frozen), frozen


def stock_features(kind: str, folder: Path) -> Tensor:
    """The mean over tokens, without padding, or over time of what transformers' loaders give."""
    model: Any = transformers.SiglipTextModel if kind == "siglip" else AutoModel
    model = model.from_pretrained(folder).eval()
    if kind in SOUND:
        extractor: Any = AutoFeatureExtractor.from_pretrained(folder)
        inputs = extractor([CLIP] * 3, sampling_rate=8000, return_tensors="pt")
        return model(**inputs).last_hidden_state.mean(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    model = model.get_encoder() if kind in ("t5", "bart") else model
    mask = tokens["attention_mask"][..., None]
    return (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("kind", [*TEXT, *SOUND])
def test_stock_loaders_and_the_configuration_give_the_same_features(
    kind: str, tmp_path: Path
) -> None:
    encoder, batch = encoder_of(kind).eval(), batch_of(kind)
    described = json.loads(json.dumps(encoder.model.config.to_dict()))
    rebuilt = type(encoder).from_config(described).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(batch), encoder(batch))
    encoder.half()
    if isinstance(encoder, WaveformEncoder):
        save_waveform_encoder(encoder, 8000, tmp_path)
    else:
        encoder.save(tmp_path, TOKENIZER)
    assert encoder.model.dtype == torch.float16  # left as it was
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    found, expected = stock_features(kind, tmp_path), encoder.float()(batch)
    rtol, atol = (1e-4, 1e-4) if kind in SOUND else (1e-5, 1e-6)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 48, "image_size": 32, "patch_size": 16}  # fmt: skip
WHOLE: dict[str, Any] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT_LIKE)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=BERT_LIKE, vision_config=VISION)
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_pretrained_weights_are_those_of_the_files_text_part(kind: str, tmp_path: Path) -> None:
    whole = WHOLE[kind]()
    whole.save_pretrained(tmp_path)
    encoder = TextEncoder.create(str(tmp_path), pretrained=True)
    theirs = getattr(whole, "text_model", whole).state_dict()
    mine, random = encoder.model.state_dict(), TextEncoder.create(str(tmp_path)).model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert not any("decoder" in name or "vision" in name for name in mine)
    assert random.keys() == mine.keys()
    assert not all(torch.equal(value, theirs[name]) for name, value in random.items())


@pytest.mark.parametrize(
    ("architecture", "model_args", "pretrained", "message"),
    [
        ("vit", {"hidden_size": 48}, False, r"^a text encoder must give a last_hidden_state"),
        ("no_such_model_type", {}, False, r"^architecture must be a model type of transformers"),
        ("bert", BERT_LIKE, True, "got the model type 'bert'"),
        ("FOLDER", {"depth": 3}, False, "must be fields of BertConfig, got depth; fields: "),
        ("FOLDER", {"num_attention_heads": 5}, False, r"^model_args must .*multiple of the number"),
        ("FOLDER", {"hidden_size": 64}, True, r"^pretrained weights must be in a directory"),
        ("FOLDER", {"num_hidden_layers": 3}, True, "be whole, and 16 are missing, such as encoder"),
    ],
)
def test_what_is_no_text_encoder_is_refused_in_a_sentence(
    architecture: str, model_args: dict[str, Any], pretrained: bool, message: str, bert: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder.create(architecture.replace("FOLDER", str(bert)), model_args, pretrained)


def test_model_args_replace_fields() -> None:
    short = TextEncoder.create("gpt2", GPT2 | {"hidden_size": 16})  # its alias of n_embd
    assert short.num_features == 16
    assert encoder_of("bart").model.config.encoder_layerdrop == 0  # whatever was asked
    with pytest.raises(ValueError, match=r"^model_type must be one that transformers knows"):
        TextEncoder.from_config({"model_type": "no_such_model_type"})


def test_short_waveforms_and_other_models_are_refused_in_a_sentence() -> None:
    encoder = WaveformEncoder.create("wav2vec2", CONVOLVED)
    assert encoder.min_samples == RECEPTIVE
    with torch.no_grad():
        assert encoder(torch.randn(1, RECEPTIVE)).shape == (1, 32)
    with pytest.raises(ValueError, match=r"at least 105 samples, the receptive field .* got 104"):
        encoder(torch.randn(1, RECEPTIVE - 1))
    for kind in ("bert", "audio-spectrogram-transformer"):
        with pytest.raises(ValueError, match=r"^architecture must be an encoder of raw waveforms"):
            WaveformEncoder.create(kind)


def test_a_tokenizer_that_cannot_pad_pads_with_the_end_or_is_refused(
    tmp_path: Path, bert: Path
) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    for name, token in (("without", None), ("with", "<end>")):
        fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=token, padding_side="left")
        fast.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        load_tokenizer(str(tmp_path / "without"))
    column = TextColumn("text", load_tokenizer(str(tmp_path / "with")))
    tokens = column.batch([("a b",), ("b",)], [0, 1], 0, 0)
    assert tokens["input_ids"].tolist() == [[0, 1], [1, 2]]
    assert tokens["attention_mask"].tolist() == [[1, 1], [1, 0]]
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    for empty in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^prime_tokenizer must (have a v|be a dir)"):
            load_tokenizer(str(empty))


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "t5"])
def test_a_tokenizer_must_suit_its_encoder(kind: str) -> None:
    longest = {"roberta": 39, "gpt2": 1024}.get(kind, 40)  # RoBERTa counts from its padding's place
    encoder = TextEncoder.create(kind, TEXT[kind])
    check_tokenizer(encoder, TOKENIZER, longest)
    assert encoder.training
    if kind != "t5":  # which has no positions to run out of
        with pytest.raises(ValueError, match=r"^prime_max_length must be at most what"):
            check_tokenizer(encoder, TOKENIZER, longest + 1)
    small = TextEncoder.create(kind, TEXT[kind] | {"vocab_size": 20})
    with pytest.raises(ValueError, match=f"got 20 for {len(TOKENIZER)} tokens; set vocab_size"):
        check_tokenizer(small, TOKENIZER, 10)
