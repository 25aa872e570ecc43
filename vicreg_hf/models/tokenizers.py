"""Tokenizers of the second branch's texts.

Shapes: B texts, T tokens, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vicreg_hf.models.text_encoder import TEXT_PART, TextEncoder
from vicreg_hf.models.transformers_models import is_model_type, open_config
from vicreg_hf.runtime.checks import one_line

USUAL_LENGTH = 64
"""Number of tokens that is enough for captions."""


def default_max_length(architecture: str) -> int:
    """Take `USUAL_LENGTH` tokens, or as many as the encoder has positions for if fewer."""
    config = open_config(architecture, TEXT_PART)
    return min(USUAL_LENGTH, getattr(config, "max_position_embeddings", None) or USUAL_LENGTH)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a directory or on the Hub; it pads on the right.

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
    # as where only a config is
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
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
