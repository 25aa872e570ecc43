"""Sound files to samples, whatever their condition.

Shapes: L samples.
"""

from __future__ import annotations

import io
from math import gcd
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.reading import FileColumn

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
"""The formats of libsndfile that are found in data sets."""
MAX_FILE = 2**28
"""Bytes of a sound file; a larger one is not read."""
MAX_SECONDS = 600.0
"""A longer clip is refused: split it into clips first."""
RATES = (2_000, 384_000)
"""Samples per second that a file may claim; beyond, resampling would need any amount of memory."""
BLOCK = 2**16
"""Samples of all channels read at once."""


class SoundColumn(FileColumn):
    """A column of sound files."""

    max_bytes = MAX_FILE

    def prepare(self, table: Any) -> Any:
        """A table of this column alone, its sounds still encoded.

        Raises:
            ValueError: soundfile is not installed.
        """
        require_soundfile()
        return super().prepare(table).cast_column(self.name, datasets.Audio(decode=False))


def require_soundfile() -> Any:
    """The library that reads sound files.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its own libsndfile
        raise ValueError(
            "columns of audio need the package soundfile, which cannot be imported: "
            f'pip install "vicreg-hf[audio]". ({error})'
        ) from None
    return soundfile


def decode_sound(data: bytes, sampling_rate: int) -> NDArray[np.float32]:
    """Decode a sound file, its channels averaged.

    Float files that exceed full scale are scaled down to it.

    Args:
        data: the file's content, in one of `FORMATS`.
        sampling_rate: of the result, in samples per second.

    Returns:
        (L,) float32 in about -1..1; resampling may go beyond by a little.

    Raises:
        ImageError: empty, damaged or longer than `MAX_SECONDS`, another format, not finite.
        ValueError: soundfile is not installed.
    """
    soundfile = require_soundfile()
    if not data:
        raise ImageError("the sound is empty (0 bytes).")
    if len(data) > MAX_FILE:
        raise ImageError(f"the file has more than the {MAX_FILE} bytes allowed.")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in FORMATS:
                raise ImageError(f"a sound must be of {', '.join(FORMATS)}, got {file.format}.")
            rate = file.samplerate
            if not RATES[0] <= rate <= RATES[1]:
                raise ImageError(
                    f"a sound must have {RATES[0]} to {RATES[1]} samples per second, got {rate}."
                )
            samples = _read_mono(file, int(MAX_SECONDS * rate))
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever their parsing meets
        raise ImageError(f"the sound cannot be decoded: {error}") from error
    if not len(samples):
        raise ImageError("the sound is empty (0 samples).")
    if not np.isfinite(samples).all():
        raise ImageError("the sound must be finite, and is not.")
    samples = samples / max(1.0, float(np.abs(samples).max()))
    if rate != sampling_rate:
        from scipy.signal import resample_poly  # takes half a second

        common = gcd(rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // common, rate // common)
    return samples.astype(np.float32)


def _read_mono(file: Any, most: int) -> NDArray[np.float64]:
    """The mean of all channels; read block by block, as a header may claim any length."""
    blocks, count = [], 0
    step = max(1, BLOCK // file.channels)
    while len(block := file.read(step, dtype="float64", always_2d=True)):
        blocks.append(block.mean(1))
        count += len(block)
        if count > most:
            raise ImageError(f"the sound is longer than the {MAX_SECONDS:g} seconds allowed.")
    return np.concatenate([np.empty(0), *blocks])
