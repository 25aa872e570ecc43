"""Columns of text, and encoders of it.

Shapes: B texts, T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.models.tokenizers import USUAL_LENGTH
from vicreg_hf.runtime.randomness import Stream, uniforms

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
