"""Columns of text, and encoders of it.

Shapes: B texts, T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vicreg_hf.images import ImageError
from vicreg_hf.modalities.stock import is_model_type, one_line, open_config
from vicreg_hf.modalities.text_encoder import TEXT_PART, TextEncoder
from vicreg_hf.randomness import Stream, uniforms

USUAL_LENGTH = 64
"""Tokens, enough for captions."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What encoders are given, of what a tokenizer makes."""


@dataclass(frozen=True)
class TextColumn:
    """Cells of one column, a caption or several each, to tokens."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int = USUAL_LENGTH
    """Tokens to which longer texts are cut, special ones included."""

    def __post_init__(self) -> None:
        special = self.tokenizer.num_special_tokens_to_add()
        if self.max_length <= special:
            raise ValueError(
                f"prime_max_length must leave room beside the {special} special tokens, got "
                f"{self.max_length}; take {special + 1} or more."
            )

    @classmethod
    def find(
        cls,
        features: datasets.Features,
        name: str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = USUAL_LENGTH,
    ) -> TextColumn:
        """The column of this name, which must hold strings or lists of them.

        Raises:
            ValueError: it does not.
        """
        check_text_column(features, name)
        return cls(name, tokenizer, max_length)

    def prepare(self, table: Any) -> Any:
        """A table of this column alone."""
        return table.select_columns([self.name])

    def decode(self, cell: Any) -> tuple[str, ...]:
        """The captions of a cell, those that say something.

        Raises:
            ImageError: there is none.
        """
        captions = [cell] if isinstance(cell, str) else cell
        if not isinstance(captions, (list, tuple)) or not all(
            caption is None or isinstance(caption, str) for caption in captions
        ):
            raise ImageError(
                f"a text must be a string or a list of strings, got {type(cell).__name__}."
            )
        kept = tuple(caption for caption in captions if caption and not caption.isspace())
        if not kept:
            raise ImageError("the text is empty.")
        return kept

    def tokens(self, texts: Sequence[str]) -> Any:
        """What the tokenizer makes of texts, padded to the longest of them."""
        return self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip

    def batch(
        self, items: Sequence[Sequence[str]], rows: ArrayLike, epoch: int, seed: int
    ) -> dict[str, Tensor]:
        """Tokens of one caption of each row, drawn evenly where there are several.

        Args:
            items: B times what `decode` gives.
            rows: (B,), which key the draws.

        Returns:
            input_ids, attention_mask and, of tokenizers that make them, token_type_ids, each
            (B, T) int64; T is the longest text's.
        """
        draws = uniforms(rows, 1, seed=seed, epoch=epoch, stream=Stream.VIEW_PRIME)[:, 0]
        texts = [
            captions[int(float(u) * len(captions))]
            for captions, u in zip(items, draws, strict=True)
        ]
        tokens = self.tokens(texts)
        return {name: tokens[name].long() for name in INPUTS if name in tokens}


def check_text_column(features: datasets.Features, name: str) -> None:
    """Make sure that a column holds strings, or lists of them.

    Raises:
        ValueError: it does not.
    """
    if name not in features or not is_text(features[name]):
        found = [other for other, feature in features.items() if is_text(feature)]
        raise ValueError(
            f"prime_column must name a column of strings or of lists of strings, got {name!r}; "
            f"columns of text: {', '.join(found) or 'none'}; all: {', '.join(features)}."
        )


def is_text(feature: Any) -> bool:
    """Whether a feature holds strings, or lists of them."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def default_max_length(architecture: str) -> int:
    """`USUAL_LENGTH` tokens, or as many as an encoder has positions for, if those are fewer."""
    config = open_config(architecture, TEXT_PART)
    return min(USUAL_LENGTH, getattr(config, "max_position_embeddings", None) or USUAL_LENGTH)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or on the Hub; it pads on the right.

    One that has no token for padding, as GPT-2's, pads with the one that ends a text: the
    attention mask keeps padding out of the features either way.

    Raises:
        ValueError: there is none, or it cannot pad.
    """
    if is_model_type(name):
        raise ValueError(
            f"prime_tokenizer must be given where the architecture is a model type, got {name!r} "
            "and none; a Hub id or a directory that holds one."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, padding_side="right"
        )
    except Exception as error:  # loaders raise whatever their files make them
        raise ValueError(
            f"prime_tokenizer must be a directory or a Hub id that AutoTokenizer loads, got "
            f"{name!r}: {one_line(error)}"
        ) from error
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # of a lone config
        raise ValueError(
            f"prime_tokenizer must have a vocabulary, and {name!r} holds none; save the tokenizer "
            "there, beside the model."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"prime_tokenizer must have a token to pad with, and {name!r} has neither "
                "pad_token nor eos_token; set one and save it again."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def check_tokenizer(
    encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    """Make sure, before training, that an encoder takes whatever a tokenizer gives.

    Raises:
        ValueError: more kinds of tokens, or longer texts, than it has embeddings for.
    """
    embeddings: Any = encoder.model.get_input_embeddings()
    num_tokens = max(tokenizer.get_vocab().values(), default=0) + 1
    if num_tokens > embeddings.num_embeddings:
        raise ValueError(
            f"the encoder must have an embedding for every token, got {embeddings.num_embeddings} "
            f"for {num_tokens} tokens; set vocab_size in prime_model_args, or take the encoder's "
            "own tokenizer."
        )
    training = encoder.training
    word = next((i for i in range(num_tokens) if i not in tokenizer.all_special_ids), 0)
    longest = torch.full((1, max_length), word, device=embeddings.weight.device)
    try:
        encoder.eval()({"input_ids": longest, "attention_mask": torch.ones_like(longest)})
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"prime_max_length must be at most what the encoder takes, got {max_length}: "
            f"{one_line(error)}"
        ) from error
    finally:
        encoder.train(training)


def save_text_encoder(
    encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> None:
    """Write an encoder and its tokenizer as stock transformers does, weights in float32.

    AutoModel and AutoTokenizer load them, and the mean of last_hidden_state over the attention
    mask is this encoder's output. Of encoder-decoders take `AutoModel.get_encoder()`, or load T5
    with AutoModelForTextEncoding, as only its encoder is written; text models that have no entry in
    AutoModel, such as SigLIP's, are loaded by the class that config.json names.
    """
    encoder.save(directory)
    tokenizer.save_pretrained(directory)
