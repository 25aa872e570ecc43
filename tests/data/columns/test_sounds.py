"""Columns of sound, as waveforms and as spectrograms."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from paired import encode_sound
from transformers import Wav2Vec2FeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.sound_files import decode_sound
from vicreg_hf.data.columns.spectrograms import (
    SpectrogramColumn,
    SpectrogramSettings,
    spectrogram_image,
)
from vicreg_hf.data.columns.waveforms import WaveformColumn

Samples = NDArray[np.float32]


def sine(frequency: float, seconds: float = 1.0, rate: int = 16_000) -> Samples:
    times = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * times)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("WAV", {"subtype": "FLOAT"}, 1e-7), ("WAV", {}, 2**-15), ("FLAC", {}, 2**-15),
        ("AIFF", {}, 2**-15), ("OGG", {}, 0.05), ("MP3", {}, 0.05),
    ],
)  # fmt: skip
def test_sound_survives_its_format(kind: str, options: Any, tolerance: float) -> None:
    samples = sine(440)
    decoded = decode_sound(encode_sound(samples, 16_000, kind, **options), 16_000)
    assert decoded.dtype == np.float32
    assert len(decoded) == len(samples)
    middle = slice(2000, -2000)  # lossy formats blur both ends
    np.testing.assert_allclose(decoded[middle], samples[middle], atol=tolerance)


def test_channels_are_averaged_and_float_files_scaled_down_to_full_scale() -> None:
    left, right = sine(440), sine(1000)
    data = encode_sound(np.stack([left, right, 0 * left], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(decode_sound(data, 16_000), (left + right) / 3, atol=1e-6)
    data = encode_sound(1e30 * sine(440), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(decode_sound(data, 16_000), 2 * sine(440), atol=1e-3)


def test_resampling_keeps_pitch_and_loudness_and_filters_what_is_too_high() -> None:
    for rate in (8_000, 44_100):
        decoded = decode_sound(encode_sound(sine(440, rate=rate), rate, subtype="FLOAT"), 16_000)
        assert len(decoded) == 16_000
        np.testing.assert_allclose(decoded[1000:-1000], sine(440)[1000:-1000], atol=2e-3)
    decoded = decode_sound(encode_sound(sine(15_000, rate=48_000), 48_000), 16_000)
    assert np.abs(decoded[1000:-1000]).max() < 0.01


WAV = encode_sound(sine(440, 0.1), 16_000)


def _patched(offset: int, value: int, width: int = 4) -> bytes:
    return WAV[:offset] + value.to_bytes(width, "little") + WAV[offset + width :]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"not a sound", "cannot be decoded"),
        (WAV[:20], "cannot be decoded"),
        (encode_sound(sine(440)[:0], 16_000), "0 samples"),
        (encode_sound(sine(440), 16_000, "AU"), "must be of WAV, .* got AU"),
        (encode_sound(np.full(99, np.nan), 16_000, subtype="FLOAT"), "must be finite"),
        (_patched(24, 2**31 - 1), "to 384000 samples per second, got 2147483647"),
        (_patched(24, 1), "2000 to"),
        (encode_sound(np.zeros(601 * 2000, np.int16), 2_000), "longer than the 600 seconds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "sound",
)
def test_what_cannot_be_used_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        decode_sound(data, 16_000)


def test_a_header_that_claims_more_than_the_file_holds_costs_nothing() -> None:
    data = _patched(40, 2**31 - 1)
    assert np.array_equal(decode_sound(data, 16_000), decode_sound(WAV, 16_000))


SOUNDS = [
    encode_sound(sine(440, 0.05), 16_000, kind) for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF")
]


@given(
    st.sampled_from(SOUNDS),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=20),
    st.integers(0, 10_000),
)
def test_damaged_sounds_are_decoded_or_refused(
    data: bytes, damage: list[tuple[int, int]], cut: int
) -> None:
    damaged = bytearray(data)
    for place, value in damage:
        damaged[place % len(damaged)] = value
    try:
        decoded = decode_sound(bytes(damaged[:cut] if cut < len(damaged) else damaged), 8_000)
    except ImageError:
        return
    assert np.isfinite(decoded).all()
    assert decoded.ndim == 1


def test_cells_are_files_in_the_table_or_beside_it(tmp_path: Path) -> None:
    column = WaveformColumn("sound")
    (tmp_path / "a.wav").write_bytes(WAV)
    from_path = column.decode({"bytes": None, "path": str(tmp_path / "a.wav")})
    assert np.array_equal(from_path, column.decode({"bytes": WAV, "path": "b.wav"}))
    missing = {"bytes": None, "path": str(tmp_path / "b.wav")}
    for cell in (None, missing, {"bytes": None, "path": None}, {}, "a.wav"):
        with pytest.raises(ImageError):
            column.decode(cell)


@pytest.mark.parametrize("plain", [False, True])
def test_columns_of_files_and_of_bytes_are_decoded_in_workers(plain: bool) -> None:
    stored: Any = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    kinds = {"sound": stored["bytes"] if plain else stored, "kind": datasets.Value("int64")}
    rows = {"sound": [WAV if plain else {"bytes": WAV, "path": None}], "kind": [0]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    if not plain:
        table = table.cast_column("sound", datasets.Audio())
    feature = table.features["sound"]
    settings = SpectrogramSettings(8000, 0.1, 16, 256)
    for column, shape in (
        (WaveformColumn("sound", 8000), (800,)),
        (SpectrogramColumn("sound", feature, settings), (1, 16, 16)),
    ):
        prepared = column.prepare(table)
        assert prepared.column_names == ["sound"]
        assert column.encoded(prepared[0]["sound"]) == WAV
        assert pickle.loads(pickle.dumps(column)).decode(prepared[0]["sound"]).shape == shape


def test_without_soundfile_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r'pip install "vicreg-hf\[audio\]"') as raised:
        WaveformColumn("sound").prepare(datasets.Dataset.from_dict({"sound": []}))
    assert not isinstance(raised.value, ImageError)


def test_pieces_are_normalised_as_the_stock_extractor_does() -> None:
    column = WaveformColumn("sound", num_samples=16_000)
    clips = [sine(440) + 0.25, 0.01 * sine(1000), 0 * sine(440)]
    extractor = Wav2Vec2FeatureExtractor()
    expected = extractor(clips, sampling_rate=16_000, return_tensors="np")["input_values"]
    batch = column.batch(clips, range(3), 0, 0)
    assert batch.dtype == torch.float32
    np.testing.assert_allclose(batch.numpy(), expected, atol=1e-4)


def test_pieces_are_cut_by_row_epoch_and_seed() -> None:
    column = WaveformColumn("sound", num_samples=1000)
    ramp = np.arange(1010, dtype=np.float32) ** 2  # no two of its pieces are alike
    starts = torch.cat([column.batch([ramp[k : k + 1000]], [0], 0, 0) for k in range(11)])

    def drawn(rows: range, epoch: int = 0, seed: int = 0) -> Any:
        pieces = column.batch([ramp] * len(rows), rows, epoch, seed)
        distances = torch.cdist(pieces.double(), starts.double())
        assert distances.amin(1).max() < 1e-3
        return distances.argmin(1)

    first = drawn(range(1100))
    assert torch.equal(drawn(range(40, 50)), first[40:50])
    assert torch.bincount(first, minlength=11).min() > 60  # of 100
    for other in (drawn(range(1100), epoch=1), drawn(range(1100), seed=1)):
        assert 60 < (other == first).sum() < 140


def test_short_clips_lie_somewhere_in_zeros() -> None:
    column = WaveformColumn("sound", num_samples=110)
    inside = column.batch([np.full(100, 0.5, np.float32)] * 1100, range(1100), 0, 0) > 0
    assert (inside.sum(1) == 100).all()
    assert torch.bincount(inside.int().argmax(1), minlength=11).min() > 60  # of 100


def test_a_spectrogram_agrees_with_that_of_transformers() -> None:
    settings = SpectrogramSettings(seconds=2.0)
    noise = np.random.default_rng(0).normal(0, 0.05, settings.num_samples)
    clip = (sine(700, 2.0) * np.linspace(0, 1, 32_000)).astype(np.float32)
    clip = (clip[: settings.num_samples] + noise).astype(np.float32)
    bank = mel_filter_bank(513, 128, 0, 8000, 16_000, norm="slaney", mel_scale="slaney")
    expected = spectrogram(
        clip, np.hanning(1025)[:-1], 1024, settings.hop_length, power=2.0, mel_filters=bank
    )[:, :128]
    decibels = 10 * np.log10(expected / expected.max())
    levels = np.round(255 * np.clip(1 + decibels / 80, 0, 1))[::-1]
    image = spectrogram_image(clip, settings)
    assert image.shape == (1, 128, 128)
    assert image.dtype == torch.uint8
    assert np.abs(image[0].numpy() - levels).max() <= 1
    assert len(np.unique(levels)) > 100
    assert image.max() == 255


def test_frequency_rises_upwards_and_time_to_the_right() -> None:
    settings = SpectrogramSettings(seconds=1.0)
    low, high = (spectrogram_image(sine(f), settings)[0] for f in (200, 4000))
    assert low.float().mean(1).argmax() > 100 > 60 > high.float().mean(1).argmax()
    late = np.concatenate([0 * sine(440, 0.5), sine(440, 0.5)])
    columns = spectrogram_image(late, settings)[0].float().amax(0)
    assert columns[:56].max() == 0
    assert columns[72:].min() > 200


def test_the_middle_of_a_long_clip_is_seen_and_a_short_one_lies_in_the_middle() -> None:
    settings = SpectrogramSettings(seconds=1.0)
    whole = settings.num_samples
    clip = np.random.default_rng(0).normal(size=whole).astype(np.float32)
    image = spectrogram_image(clip, settings)
    long = np.concatenate([sine(100), clip, sine(100)])
    assert torch.equal(spectrogram_image(long, settings), image)
    short = spectrogram_image(clip[:4001], settings)[0].float().amax(0)
    bright = short.nonzero().flatten()
    assert 38 <= len(bright) <= 42  # 4001 / 125 samples of a hop, and 1024 of a frame
    assert abs((bright[0] + bright[-1]) / 2 - 64) < 1.5


def test_loudness_does_not_matter_and_silence_is_black() -> None:
    settings = SpectrogramSettings(seconds=1.0)
    loud, quiet = (spectrogram_image(k * sine(440), settings).int() for k in (1, 1e-6))
    assert (loud - quiet).abs().max() <= 1
    assert spectrogram_image(0 * sine(440), settings).max() == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seconds": 0.05}, "longer than a frame"),
        ({"fft_length": 256}, "every mel band must hold a frequency"),
        ({"num_mels": 0}, "num_mels must be positive, got 0"),
        ({"max_frequency": 9000.0}, "at most half the sampling rate"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        SpectrogramSettings(**options)


def test_settings_survive_json() -> None:
    settings = SpectrogramSettings(seconds=3.0)
    assert SpectrogramSettings(**json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.hop_length == 375
