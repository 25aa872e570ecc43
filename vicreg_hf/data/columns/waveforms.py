"""Columns of sound as waveforms.

Shapes: B clips, L samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vicreg_hf.data.columns.base import BatchColumn
from vicreg_hf.data.columns.sound_files import SoundColumn, decode_sound
from vicreg_hf.runtime.randomness import Stream, uniforms

VARIANCE_EPS = 1e-7
"""Added to the variance, as in Wav2Vec2FeatureExtractor."""


@dataclass(frozen=True)
class WaveformColumn(SoundColumn, BatchColumn):
    """A column of sound files, of which encoders take pieces of one length."""

    sampling_rate: int = 16_000
    """Samples per second that the encoder takes."""
    num_samples: int = 80_000
    """Samples of a piece."""

    def decode(self, cell: Any) -> NDArray[np.float32]:
        """The clip of a cell, (L,) float32; errors as in `Column.decode`."""
        return decode_sound(self.encoded(cell), self.sampling_rate)

    def batch(
        self, items: Sequence[NDArray[np.float32]], rows: ArrayLike, epoch: int, seed: int
    ) -> Tensor:
        """A random piece of each clip, of zero mean and unit variance: (B, num_samples) float32.

        A longer clip gives a piece about its middle, which is what spectrograms show: where it
        starts is drawn evenly within a quarter of the piece's length to either side. A clip that is
        too short is put into zeros at a place drawn evenly. The normalisation is
        Wav2Vec2FeatureExtractor's; it undoes any gain, so none is drawn.
        """
        draws = uniforms(rows, 1, seed=seed, epoch=epoch, stream=Stream.VIEW_PRIME)[:, 0]
        return self._cut(items, draws)

    def middle(self, items: Sequence[NDArray[np.float32]]) -> Tensor:
        """The middle of each clip, for evaluation: (B, num_samples) float32."""
        return self._cut(items, np.full(len(items), 0.5, np.float32))

    def _cut(self, items: Sequence[NDArray[np.float32]], draws: NDArray[np.float32]) -> Tensor:
        pieces = np.zeros((len(items), self.num_samples), np.float32)
        for piece, clip, u in zip(pieces, items, draws, strict=True):
            spare = len(clip) - self.num_samples
            moved = min(abs(spare), self.num_samples // 2) if spare > 0 else -spare
            start = (abs(spare) - moved) // 2 + int(float(u) * (moved + 1))
            if spare >= 0:
                piece[:] = clip[start : start + self.num_samples]
            else:
                piece[start : start + len(clip)] = clip
        centred = pieces - pieces.mean(1, keepdims=True)
        return torch.from_numpy(centred / np.sqrt(pieces.var(1, keepdims=True) + VARIANCE_EPS))
