"""Encoders of text and their tokenizers, built of models of stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paired import word_tokenizer, write_text_encoder
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipTextModel,
    T5Config,
    T5ForConditionalGeneration,
)

from vicreg_hf.data.columns.texts import TextColumn
from vicreg_hf.models.text_encoder import TextEncoder
from vicreg_hf.models.tokenizers import check_tokenizer, load_tokenizer

TOKENIZER = word_tokenizer()
BERT_LIKE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40,
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
DISTILBERT: dict[str, Any] = {
    "vocab_size": len(TOKENIZER), "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48,
}  # fmt: skip
LLAMA = BERT_LIKE | {"num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "bert": BERT_LIKE, "distilbert": DISTILBERT, "roberta": BERT_LIKE, "mpnet": BERT_LIKE,
    "gpt2": GPT2, "llama": LLAMA, "t5": T5, "bart": BART, "clip": BERT_LIKE, "siglip": BERT_LIKE,
}  # fmt: skip
CAPTIONS = ["a small red circle at the top left", "a large blue cross", "the middle"]


def tokens_of(texts: list[str]) -> dict[str, Tensor]:
    column = TextColumn("caption", TOKENIZER)
    return column.batch([(text,) for text in texts], range(len(texts)), 0, 0)


def encoder_of(kind: str) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder.create(kind, MODELS[kind])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("kind", MODELS)
def test_padding_is_no_part_of_the_mean_and_every_parameter_in_use_gets_a_gradient(
    kind: str,
) -> None:
    encoder = encoder_of(kind).eval()
    together = encoder(tokens_of(CAPTIONS))
    alone = torch.cat([encoder(tokens_of([text])) for text in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[1], together[2], atol=1e-2)
    assert together.shape == (3, encoder.num_features) == (3, 32)
    together.square().sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    unused = {"siglip": "head", "bart": "decoder", "llama": "embed"}.get(kind, "pooler")
    assert all(unused in name for name in frozen), frozen


LOADERS: dict[str, Any] = {
    "t5": lambda folder: AutoModel.from_pretrained(folder).get_encoder(),
    "bart": lambda folder: AutoModel.from_pretrained(folder).get_encoder(),
    "siglip": SiglipTextModel.from_pretrained,
}


@pytest.mark.parametrize("kind", MODELS)
def test_stock_loaders_and_the_configuration_give_the_same_features(
    kind: str, tmp_path: Path
) -> None:
    encoder = encoder_of(kind).eval()
    described = json.loads(json.dumps(encoder.model.config.to_dict()))
    rebuilt = TextEncoder.from_config(described).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    needed = [[p.requires_grad for p in e.parameters()] for e in (encoder, rebuilt)]
    assert needed[0] == needed[1]
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens_of(CAPTIONS)), encoder(tokens_of(CAPTIONS)))
    encoder.half().save(tmp_path, TOKENIZER)
    assert (tmp_path / "model.safetensors").is_file()
    assert encoder.model.dtype == torch.float16  # left as it was
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    stock: Any = LOADERS.get(kind, AutoModel.from_pretrained)(tmp_path).eval()
    with torch.no_grad():
        expected = encoder.float()(tokens_of(CAPTIONS))
        hidden = stock(**inputs).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    torch.testing.assert_close((hidden * mask).sum(1) / mask.sum(1), expected, rtol=1e-5, atol=1e-6)


def test_pretrained_weights_are_those_of_the_files(bert: Path) -> None:
    torch.manual_seed(1)
    pretrained = TextEncoder.create(str(bert), pretrained=True)
    stock: Any = AutoModel.from_pretrained(bert)
    theirs = stock.state_dict()
    for name, value in pretrained.model.state_dict().items():
        assert torch.equal(value, theirs[name])
    random = TextEncoder.create(str(bert))
    name = "embeddings.word_embeddings.weight"
    assert random.model.state_dict().keys() == pretrained.model.state_dict().keys()
    assert not torch.equal(random.model.state_dict()[name], theirs[name])


def test_an_encoder_decoder_starts_from_its_encoder(tmp_path: Path) -> None:
    both = T5ForConditionalGeneration(T5Config(**T5))
    both.save_pretrained(tmp_path)
    encoder = TextEncoder.create(str(tmp_path), pretrained=True)
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, both.state_dict()[name]), name
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_a_dual_model_starts_from_its_text_model(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 48, "image_size": 32, "patch_size": 16}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=BERT_LIKE, vision_config=vision)).save_pretrained(tmp_path)
    encoder = TextEncoder.create(str(tmp_path), {"attention_dropout": 0.25}, pretrained=True)
    stock: Any = CLIPModel.from_pretrained(tmp_path)
    theirs = stock.text_model.state_dict()
    mine = encoder.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert encoder.model.config.model_type == "clip_text_model"
    assert encoder.model.config.attention_dropout == 0.25


def test_model_args_replace_fields(bert: Path) -> None:
    shallow: Any = TextEncoder.create(str(bert), {"num_hidden_layers": 1}).model
    assert len(shallow.encoder.layer) == 1
    short = TextEncoder.create("gpt2", GPT2 | {"hidden_size": 16})  # its alias of n_embd
    assert short.num_features == 16
    with pytest.raises(ValueError, match="must be fields of BertConfig, got depth; fields: "):
        TextEncoder.create(str(bert), {"depth": 3})
    with pytest.raises(ValueError, match=r"^model_args must .*multiple of the number of attention"):
        TextEncoder.create(str(bert), {"num_attention_heads": 5})


def test_what_is_no_text_encoder_is_refused_in_a_sentence(tmp_path: Path, bert: Path) -> None:
    for kind in ("vit", "wav2vec2"):
        with pytest.raises(ValueError, match=r"^a text encoder must give a last_hidden_state"):
            TextEncoder.create(kind, {"num_hidden_layers": 1, "hidden_size": 48})
    with pytest.raises(ValueError, match=r"^architecture must be a model type of transformers"):
        TextEncoder.create("no_such_model_type")
    with pytest.raises(ValueError, match=r"^architecture must be a model type of transformers"):
        TextEncoder.create(str(tmp_path))
    with pytest.raises(ValueError, match="got the model type 'bert'"):
        TextEncoder.create("bert", MODELS["bert"], pretrained=True)
    with pytest.raises(ValueError, match=r"^model_type must be one that transformers knows"):
        TextEncoder.from_config({"model_type": "no_such_model_type"})
    with pytest.raises(ValueError, match=r"^pretrained weights must be in a directory"):
        TextEncoder.create(str(bert), {"hidden_size": 64}, pretrained=True)
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(ValueError, match=r"^pretrained weights must be in a directory"):
        TextEncoder.create(str(tmp_path), pretrained=True)


def test_weights_that_lack_a_layer_are_refused(bert: Path) -> None:
    with pytest.raises(
        ValueError, match=r"must be whole, and 16 are missing, such as encoder\.lay"
    ):
        TextEncoder.create(str(bert), {"num_hidden_layers": 3}, pretrained=True)


def test_a_tokenizer_that_cannot_pad_pads_with_the_end_or_is_refused(
    tmp_path: Path, bert: Path
) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    without = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left")
    without.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        load_tokenizer(str(tmp_path / "without"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", padding_side="left"
    ).save_pretrained(tmp_path / "with")
    column = TextColumn("text", load_tokenizer(str(tmp_path / "with")))
    tokens = column.batch([("a b",), ("b",)], [0, 1], 0, 0)
    assert tokens["input_ids"].tolist() == [[0, 1], [1, 2]]
    assert tokens["attention_mask"].tolist() == [[1, 1], [1, 0]]
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    for empty in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^prime_tokenizer must (have a v|be a dir)"):
            load_tokenizer(str(empty))


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "clip", "t5"])
def test_a_tokenizer_must_suit_its_encoder(kind: str) -> None:
    longest = {"roberta": 39, "gpt2": 1024}.get(kind, 40)  # RoBERTa counts from its padding's place
    encoder = encoder_of(kind)
    check_tokenizer(encoder, TOKENIZER, longest)
    assert encoder.training
    if kind != "t5":  # which has no positions to run out of
        with pytest.raises(ValueError, match=r"^prime_max_length must be at most what"):
            check_tokenizer(encoder, TOKENIZER, longest + 1)
    small = TextEncoder.create(kind, MODELS[kind] | {"vocab_size": 20})
    with pytest.raises(ValueError, match=f"got 20 for {len(TOKENIZER)} tokens; set vocab_size"):
        check_tokenizer(small, TOKENIZER, 10)


def test_a_bart_configuration_is_saved_without_dropped_layers() -> None:
    assert encoder_of("bart").model.config.encoder_layerdrop == 0
    assert BartConfig(**BART).encoder_layerdrop == 0.5
