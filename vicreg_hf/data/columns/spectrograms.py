"""Columns of sound, as waveforms or as gray images of spectrograms.

Shapes: B clips, L samples, M mel bands, T frames.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from vicreg_hf.data.columns.sound_files import (
    check_audio_column,
    decode_sound,
    prepare_audio,
    sound_file,
)


@dataclass(frozen=True)
class SpectrogramSettings:
    """How a clip becomes a gray image of num_mels x num_mels pixels."""

    sampling_rate: int = 16_000
    """Samples per second."""
    seconds: float = 5.0
    """Of a clip that are seen: the middle; shorter clips are put into the middle of silence."""
    num_mels: int = 128
    """Bands, of equal width on Slaney's mel scale, and frames."""
    fft_length: int = 1024
    """Samples of a frame, under a Hann window."""
    min_frequency: float = 0.0
    """Hz, of the lowest band."""
    max_frequency: float | None = None
    """Hz, of the highest band; None is half the sampling rate."""
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
            warnings.simplefilter("ignore")  # of what is raised here
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
        """Of a clip that are seen; less than a hop short of `seconds`."""
        return self.hop_length * self.num_mels

    @property
    def num_frames(self) -> int:
        """T."""
        return self.num_mels

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
    samples = _middle(torch.from_numpy(clip), settings.num_samples)
    window = torch.hann_window(settings.fft_length)
    spectrum = torch.stft(
        samples, settings.fft_length, settings.hop_length, window=window, center=True,
        pad_mode="reflect", return_complex=True,
    )  # fmt: skip
    power = mel_filters(settings) @ spectrum.abs().square()[:, : settings.num_frames]
    loudest = power.amax()
    if loudest == 0:
        return torch.zeros(1, *power.shape, dtype=torch.uint8)
    decibels = 10 * torch.log10((power / loudest).clamp(min=10 ** (-settings.range_db / 10)))
    levels = (decibels / settings.range_db + 1).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).flip(0).unsqueeze(0)


def _middle(samples: Tensor, length: int) -> Tensor:
    spare = len(samples) - length
    if spare >= 0:
        return samples[spare // 2 : spare // 2 + length]
    return functional.pad(samples, (-spare // 2, -spare - -spare // 2))


@dataclass(frozen=True)
class SpectrogramColumn:
    """Cells of one column, a sound file each, to gray images; stands in for an ImageColumn."""

    name: str
    feature: Any
    settings: SpectrogramSettings = field(default_factory=SpectrogramSettings)
    channels: int = 1

    def __post_init__(self) -> None:
        if self.channels != 1:
            raise ValueError(f"a spectrogram has 1 channel, got channels={self.channels}.")

    @classmethod
    def find(
        cls,
        features: datasets.Features,
        name: str,
        settings: SpectrogramSettings | None = None,
    ) -> SpectrogramColumn:
        """The column of this name, which must hold sound files.

        Raises:
            ValueError: it does not, or soundfile is not installed.
        """
        check_audio_column(features, name)
        return cls(name, features[name], settings or SpectrogramSettings())

    def prepare(self, table: Any) -> Any:
        """A table of this column alone, its sound still encoded."""
        return prepare_audio(table, self.name)

    def encoded(self, cell: Any) -> bytes:
        """What identifies a cell: the sound's file.

        Raises:
            ImageError: a file that cannot be read.
        """
        return sound_file(cell)

    def decode(self, cell: Any) -> Tensor:
        """The spectrogram of a cell, (1, M, T) uint8.

        Raises:
            ImageError: the sound cannot be read or decoded.
        """
        clip = decode_sound(self.encoded(cell), self.settings.sampling_rate)
        return spectrogram_image(clip, self.settings)
