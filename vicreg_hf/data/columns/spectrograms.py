"""Columns of sound as gray images of spectrograms.

Shapes: L samples, M mel bands, T frames; T = M.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from vicreg_hf.data.columns.sound_files import SoundColumn, decode_sound


@dataclass(frozen=True)
class SpectrogramSettings:
    """How a clip becomes a gray image of num_mels x num_mels pixels."""

    sampling_rate: int = 16_000
    """Samples per second."""
    seconds: float = 5.0
    """Seconds that are seen, from the middle; shorter clips lie in the middle of silence."""
    num_mels: int = 128
    """Number of bands, of equal width on Slaney's mel scale, and of frames."""
    fft_length: int = 1024
    """Samples in a frame, under a Hann window."""
    min_frequency: float = 0.0
    """Lower end of the lowest band in Hz."""
    max_frequency: float | None = None
    """Upper end of the highest band in Hz; None is half the sampling rate."""
    range_db: float = 80.0
    """Decibels between black and white; white is the clip's loudest band and frame."""

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "seconds", "num_mels", "fft_length", "range_db"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        half = self.sampling_rate / 2
        top = half if self.max_frequency is None else self.max_frequency
        if not 0 <= self.min_frequency < top <= half:
            raise ValueError(
                f"min_frequency and max_frequency must rise from 0 to at most half the sampling "
                f"rate, {half:g} Hz, got {self.min_frequency:g} and {top:g}."
            )
        if self.num_samples <= self.fft_length:
            raise ValueError(
                f"seconds must be longer than a frame, got {self.seconds} s of "
                f"{self.sampling_rate} samples and frames of {self.fft_length} samples; lower "
                "fft_length."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers warns of what is raised below
            filters = mel_filters(self)
        if (filters.amax(1) == 0).any():
            raise ValueError(
                f"every mel band must hold a frequency of the transform, got num_mels="
                f"{self.num_mels} and fft_length={self.fft_length}; lower num_mels or raise "
                "fft_length."
            )

    @property
    def hop_length(self) -> int:
        """Samples from frame to frame, so that there are as many frames as bands."""
        return int(self.sampling_rate * self.seconds) // self.num_mels

    @property
    def num_samples(self) -> int:
        """Samples that are seen, less than a hop short of `seconds`."""
        return self.hop_length * self.num_mels

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@lru_cache(maxsize=8)
def mel_filters(settings: SpectrogramSettings) -> Tensor:
    """Power at the transform's frequencies to power in bands, (M, fft_length / 2 + 1) float32."""
    bank = mel_filter_bank(
        num_frequency_bins=settings.fft_length // 2 + 1,
        num_mel_filters=settings.num_mels,
        min_frequency=settings.min_frequency,
        max_frequency=settings.max_frequency or settings.sampling_rate / 2,
        sampling_rate=settings.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank.T.astype(np.float32))


def spectrogram_image(clip: NDArray[np.float32], settings: SpectrogramSettings) -> Tensor:
    """The log-mel spectrogram of a clip as a gray image.

    Time runs to the right, a frame per hop; low frequencies are at the bottom. Levels are decibels
    of power: 255 is the clip's maximum, 0 is range_db below it, and silence is all 0.

    Args:
        clip: (L,) at the settings' sampling rate.

    Returns:
        (1, M, T) uint8.
    """
    missing = settings.num_samples - len(clip)
    left = int(missing / 2)  # where the clip is longer, a negative number of samples is added
    samples = functional.pad(torch.from_numpy(clip), (left, missing - left))
    window = torch.hann_window(settings.fft_length)
    spectrum = torch.stft(
        samples, settings.fft_length, settings.hop_length, window=window, center=True,
        pad_mode="reflect", return_complex=True,
    )  # fmt: skip
    power = mel_filters(settings) @ spectrum.abs().square()[:, : settings.num_mels]
    loudest = power.amax()
    if loudest == 0:
        return torch.zeros(1, *power.shape, dtype=torch.uint8)
    decibels = 10 * torch.log10((power / loudest).clamp(min=10 ** (-settings.range_db / 10)))
    levels = (decibels / settings.range_db + 1).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).flip(0).unsqueeze(0)


@dataclass(frozen=True)
class SpectrogramColumn(SoundColumn):
    """A column of sound files that are seen as gray images, in the place of an `ImageColumn`."""

    feature: Any
    settings: SpectrogramSettings = field(default_factory=SpectrogramSettings)
    channels: ClassVar[int] = 1

    def decode(self, cell: Any) -> Tensor:
        """The spectrogram of a cell, (1, M, T) uint8, whole; errors as in `Column.decode`."""
        clip = decode_sound(self.encoded(cell), self.settings.sampling_rate)
        return spectrogram_image(clip, self.settings)
