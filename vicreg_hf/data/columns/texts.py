"""Columns of text.

Shapes: B texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vicreg_hf.data.columns.base import BatchColumn
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.models.tokenizers import USUAL_LENGTH
from vicreg_hf.runtime.randomness import Stream, uniforms

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The outputs of a tokenizer that encoders take."""


@dataclass(frozen=True)
class TextColumn(BatchColumn):
    """A column of captions, one or several in a cell."""

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

    def decode(self, cell: Any) -> tuple[str, ...]:
        """The captions of a cell that are not blank, at least one; errors as in `Column.decode`."""
        captions = cell if isinstance(cell, list) else [cell]
        kept = tuple(caption for caption in captions if caption and not caption.isspace())
        if not kept:
            raise ImageError("the text is empty.")
        return kept

    def tokens(self, texts: Sequence[str]) -> Any:
        """The tokenizer's output for texts, padded to the longest of them."""
        return self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip

    def batch(
        self, items: Sequence[Sequence[str]], rows: ArrayLike, epoch: int, seed: int
    ) -> dict[str, Tensor]:
        """The tokens of one caption of each row, drawn evenly where there are several.

        Returns:
            input_ids, attention_mask and, if the tokenizer makes them, token_type_ids, each
            (B, T) int64; T is the longest text's.
        """
        draws = uniforms(rows, 1, seed=seed, epoch=epoch, stream=Stream.VIEW_PRIME)[:, 0]
        texts = [
            captions[int(float(u) * len(captions))]
            for captions, u in zip(items, draws, strict=True)
        ]
        tokens = self.tokens(texts)
        return {name: tokens[name].long() for name in INPUTS if name in tokens}
