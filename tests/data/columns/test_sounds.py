"""Columns of sound, and encoders of waveforms, with real files and models of stock transformers."""

from __future__ import annotations

import json
import pickle
import subprocess
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
from paired import encode_sound, write_clips
from scipy.signal import find_peaks
from sklearn.linear_model import RidgeClassifier
from transformers import AutoModel, Wav2Vec2FeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram
from workflow import LIMIT

from vicreg_hf.data.columns.base import BatchColumn
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.sound_files import decode_sound
from vicreg_hf.data.columns.spectrograms import (
    SpectrogramColumn,
    SpectrogramSettings,
    spectrogram_image,
)
from vicreg_hf.data.columns.waveforms import WaveformColumn
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.models.waveform_encoder import (
    WaveformEncoder,
    save_waveform_encoder,
)

Samples = NDArray[np.float32]
TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": [16, 16, 16], "conv_kernel": [10, 8, 4], "conv_stride": [5, 4, 2],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.5, "mask_time_length": 2,
    "layerdrop": 0.5,
}  # fmt: skip
KINDS = ["wav2vec2", "hubert", "wavlm", "data2vec-audio", "wav2vec2-conformer"]
RECEPTIVE = 105  # 10 + 5 * (8 - 1) + 5 * 4 * (4 - 1)


def sine(frequency: float, seconds: float = 1.0, rate: int = 16_000) -> Samples:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = write_clips(tmp_path_factory.mktemp("clips"), rows=120, test_rows=60, rate=8_000)
    return open_dataset(str(folder))


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("WAV", {"subtype": "FLOAT"}, 0),
        ("WAV", {}, 2**-15),
        ("WAV", {"subtype": "PCM_24"}, 2**-23),
        ("WAV", {"subtype": "PCM_U8"}, 2**-7),
        ("FLAC", {}, 2**-15),
        ("AIFF", {}, 2**-15),
        ("OGG", {}, 0.05),
        ("MP3", {}, 0.05),
    ],
)
def test_sound_survives_its_format(kind: str, options: Any, tolerance: float) -> None:
    samples = sine(440)
    decoded = decode_sound(encode_sound(samples, 16_000, kind, **options), 16_000)
    assert decoded.dtype == np.float32
    assert len(decoded) == len(samples)
    middle = slice(2000, -2000)  # lossy formats blur both ends
    np.testing.assert_allclose(decoded[middle], samples[middle], atol=max(tolerance, 1e-7))


def test_channels_are_averaged() -> None:
    left, right = sine(440), sine(1000)
    data = encode_sound(np.stack([left, right, 0 * left], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(decode_sound(data, 16_000), (left + right) / 3, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_resampling_keeps_pitch_and_loudness(rate: int) -> None:
    decoded = decode_sound(encode_sound(sine(440, rate=rate), rate, subtype="FLOAT"), 16_000)
    assert len(decoded) == 16_000
    np.testing.assert_allclose(decoded[1000:-1000], sine(440)[1000:-1000], atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_filtered_out() -> None:
    decoded = decode_sound(encode_sound(sine(15_000, rate=48_000), 48_000), 16_000)
    assert np.abs(decoded[1000:-1000]).max() < 0.01


def test_float_files_beyond_full_scale_are_scaled_down() -> None:
    data = encode_sound(1e30 * sine(440), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(decode_sound(data, 16_000), 2 * sine(440), atol=1e-3)


WAV = encode_sound(sine(440, 0.1), 16_000)


def _patched(offset: int, value: int, width: int = 4) -> bytes:
    return WAV[:offset] + value.to_bytes(width, "little") + WAV[offset + width :]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"not a sound", "cannot be decoded"),
        (WAV[:20], "cannot be decoded"),
        (bytes(1000), "cannot be decoded"),
        (encode_sound(sine(440)[:0], 16_000), "0 samples"),
        (encode_sound(sine(440), 16_000, "AU"), "must be of WAV, .* got AU"),
        (encode_sound(np.full(99, np.nan), 16_000, subtype="FLOAT"), "must be finite"),
        (encode_sound(np.full(99, np.inf), 16_000, subtype="FLOAT"), "must be finite"),
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


@given(st.binary(max_size=200), st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM"]))
def test_bytes_of_any_kind_are_refused(tail: bytes, head: bytes) -> None:
    with pytest.raises(ImageError):
        decode_sound(head + tail, 8_000)


def test_cells_are_files_in_the_table_or_beside_it(tmp_path: Path) -> None:
    column = WaveformColumn("sound")
    (tmp_path / "a.wav").write_bytes(WAV)
    from_path = column.decode({"bytes": None, "path": str(tmp_path / "a.wav")})
    assert np.array_equal(from_path, column.decode({"bytes": WAV, "path": "b.wav"}))
    missing = {"bytes": None, "path": str(tmp_path / "b.wav")}
    for cell in (
        None,
        missing,
        {"bytes": None, "path": None},
        {},
        "a.wav",
        {"bytes": b"", "path": ""},
    ):
        with pytest.raises(ImageError):
            column.decode(cell)


@pytest.mark.parametrize("plain", [False, True])
def test_columns_of_audio_are_found_and_others_refused(splits: Any, plain: bool) -> None:
    table = splits["train"]
    if plain:
        bare = table.cast_column("sound", datasets.Audio(decode=False))
        files = [cell["bytes"] for cell in bare["sound"]]
        table = datasets.Dataset.from_dict({"sound": files, "kind": table["kind"]})
    for column in (
        WaveformColumn.find(table.features, "sound", sampling_rate=8000),
        SpectrogramColumn.find(table.features, "sound", SpectrogramSettings(8000, 1.0, 64, 512)),
    ):
        prepared = column.prepare(table)
        assert prepared.column_names == ["sound"]
        column = pickle.loads(pickle.dumps(column))
        assert column.decode(prepared[0]["sound"]).shape in [(8000,), (1, 64, 64)]
    for kind in (WaveformColumn, SpectrogramColumn):
        with pytest.raises(ValueError, match=r"^prime_column must name .* all: sound, kind"):
            kind.find(table.features, "kind")


def test_without_soundfile_the_remedy_is_told(splits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=r'pip install "vicreg-hf\[audio\]"') as raised:
        WaveformColumn.find(splits["train"].features, "sound")
    assert not isinstance(raised.value, ImageError)


def test_pieces_are_normalised_as_the_stock_extractor_does() -> None:
    column: BatchColumn = WaveformColumn("sound", num_samples=16_000)
    clips = [sine(440) + 0.25, 0.01 * sine(1000), 0 * sine(440)]
    extractor = Wav2Vec2FeatureExtractor()
    expected = extractor(clips, sampling_rate=16_000, return_tensors="np")["input_values"]
    batch = column.batch(clips, range(3), 0, 0)
    assert isinstance(batch, torch.Tensor)
    assert batch.dtype == torch.float32
    np.testing.assert_allclose(batch.numpy(), expected, atol=1e-4)


def test_pieces_are_cut_by_row_epoch_and_seed() -> None:
    column = WaveformColumn("sound", num_samples=1000)
    ramp = np.arange(1010, dtype=np.float32) ** 2  # of which no two pieces are alike
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
    batch = column.batch([np.full(100, 0.5, np.float32)] * 1100, range(1100), 0, 0)
    inside = batch > 0
    assert (inside.sum(1) == 100).all()
    starts = inside.int().argmax(1)
    assert torch.bincount(starts, minlength=11).min() > 60  # of 100
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        WaveformColumn("sound", num_samples=0)


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
    image = spectrogram_image(sine(440), settings)
    quiet = spectrogram_image(1e-6 * sine(440), settings)
    assert (image.int() - quiet.int()).abs().max() <= 1
    assert spectrogram_image(0 * sine(440), settings).max() == 0
    assert spectrogram_image(np.ones(1, np.float32), settings).shape == (1, 128, 128)


def test_a_chord_shows_its_notes() -> None:
    image = spectrogram_image(sine(500) + sine(1500) + sine(4000), SpectrogramSettings(seconds=1.0))
    profile = image[0].flip(0).float().mean(1).numpy()
    assert len(find_peaks(profile, height=200, prominence=50)[0]) == 3


def test_settings_are_json_and_checked() -> None:
    settings = SpectrogramSettings(seconds=3.0)
    assert SpectrogramSettings(**json.loads(json.dumps(settings.to_dict()))) == settings
    assert settings.hop_length == 375
    for options, sentence in [
        ({"seconds": 0.05}, "longer than a frame"),
        ({"fft_length": 256}, "every mel band must hold a frequency"),
        ({"num_mels": 0}, "num_mels must be positive, got 0"),
        ({"range_db": -1.0}, "range_db must be positive"),
        ({"min_frequency": 9000.0}, "min_frequency"),
        ({"max_frequency": 9000.0}, "at most half the sampling rate"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            SpectrogramSettings(**options)


def test_a_spectrogram_column_stands_in_for_an_image_column(splits: Any) -> None:
    """And the classes of clips can be told from what it gives."""
    settings = SpectrogramSettings(8_000, 1.0, 32, 256)
    features, labels = {}, {}
    for name, table in splits.items():
        column = SpectrogramColumn.find(table.features, "sound", settings)
        prepared = column.prepare(table)
        assert column.encoded(prepared[0]["sound"])[:4] == b"RIFF"
        features[name] = torch.stack([column.decode(cell) for cell in prepared["sound"]])
        labels[name] = table["kind"]
    assert {n for n in dir(ImageColumn) if n[0] != "_"} <= set(dir(SpectrogramColumn))
    x = {name: images.flatten(1).numpy() / 255 for name, images in features.items()}
    classifier = RidgeClassifier().fit(x["train"], labels["train"])
    assert classifier.score(x["test"], labels["test"]) > 0.6  # of 12 classes
    with pytest.raises(ValueError, match="has 1 channel, got channels=3"):
        SpectrogramColumn("sound", None, channels=3)


def encoder_of(kind: str) -> WaveformEncoder:
    torch.manual_seed(0)
    return WaveformEncoder.create(kind, TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_in_use_gets_a_gradient(kind: str) -> None:
    encoder = encoder_of(kind)
    features = encoder(torch.randn(3, 1600))
    assert features.shape == (3, encoder.num_features) == (3, 32)
    features.square().sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
    assert "model.masked_spec_embed" in frozen
    unused = "pos_conv_embed" if kind == "wav2vec2-conformer" else "masked_spec_embed"
    assert all(unused in name for name in frozen - {"model.masked_spec_embed"}), frozen


@pytest.mark.parametrize("kind", KINDS)
def test_training_draws_only_from_torch(kind: str) -> None:
    encoder = encoder_of(kind)
    waveforms = torch.randn(2, 1600)
    outputs = []
    for state in (0, 1):
        np.random.seed(state)  # noqa: NPY002
        torch.manual_seed(0)
        outputs.append(encoder(waveforms))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_rebuilt_from_its_configuration(kind: str) -> None:
    encoder = encoder_of(kind).eval()
    described = json.loads(json.dumps(encoder.model.config.to_dict()))
    rebuilt = WaveformEncoder.from_config(described).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    waveforms = torch.randn(2, 1600)
    with torch.no_grad():
        assert torch.equal(rebuilt(waveforms), encoder(waveforms))


STOCK = """
import json, sys
sys.modules["vicreg_hf"] = None  # importing it fails
import numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModel
torch.set_num_threads(1)
clip, found = np.load(sys.argv[1]), {}
for kind, folder in json.loads(sys.argv[2]).items():
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    given = extractor(clip, sampling_rate=8000, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**given).last_hidden_state
    found[kind] = hidden.mean(1).tolist()
json.dump(found, open(sys.argv[3], "w"))
"""


def test_stock_loaders_give_the_same_features(tmp_path: Path) -> None:
    """In a process that cannot import vicreg_hf."""
    clip = sine(440, 0.2, 8000) + 0.1
    np.save(tmp_path / "clip.npy", clip)
    batch = WaveformColumn("sound", 8000, 1600).batch([clip], [0], 0, 0)
    expected, folders = {}, {}
    for kind in KINDS:
        encoder = encoder_of(kind).eval()
        save_waveform_encoder(encoder.to(torch.bfloat16), 8000, tmp_path / kind)
        assert encoder.model.dtype == torch.bfloat16
        with torch.no_grad():
            expected[kind] = encoder.float()(batch)
        folders[kind] = str(tmp_path / kind)
        assert json.loads((tmp_path / kind / "config.json").read_text())["dtype"] == "float32"
    files = [str(tmp_path / "clip.npy"), json.dumps(folders), str(tmp_path / "features.json")]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *files], capture_output=True, text=True, cwd=tmp_path,
        timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "features.json").read_text())
    for kind, features in expected.items():
        torch.testing.assert_close(torch.tensor(found[kind]), features, rtol=1e-4, atol=1e-4)


def test_pretrained_weights_are_those_of_the_files(tmp_path: Path) -> None:
    save_waveform_encoder(encoder_of("hubert"), 16_000, tmp_path)
    encoder = WaveformEncoder.create(str(tmp_path), {"hidden_dropout": 0.3}, pretrained=True)
    stock: Any = AutoModel.from_pretrained(tmp_path)
    theirs = stock.state_dict()
    assert all(torch.equal(value, theirs[k]) for k, value in encoder.model.state_dict().items())
    assert encoder.model.config.hidden_dropout == 0.3
    with pytest.raises(ValueError, match="must be whole, and 16 are missing"):
        WaveformEncoder.create(str(tmp_path), {"num_hidden_layers": 3}, pretrained=True)
    with pytest.raises(ValueError, match=r"^pretrained weights must be in a directory"):
        WaveformEncoder.create(str(tmp_path), {"hidden_size": 64}, pretrained=True)


def test_short_waveforms_and_other_models_are_refused_in_a_sentence(tmp_path: Path) -> None:
    encoder = encoder_of("wav2vec2")
    assert encoder.min_samples == RECEPTIVE
    with torch.no_grad():
        assert encoder(torch.randn(1, RECEPTIVE)).shape == (1, 32)
    with pytest.raises(ValueError, match=r"at least 105 samples, the receptive field .* got 104"):
        encoder(torch.randn(1, RECEPTIVE - 1))
    assert WaveformEncoder.create("wav2vec2", {"num_hidden_layers": 1}).min_samples == 400
    for kind in ("bert", "audio-spectrogram-transformer"):
        with pytest.raises(ValueError, match=r"^architecture must be an encoder of raw waveforms"):
            WaveformEncoder.create(kind)
    for name in ("no_such_model_type", str(tmp_path)):
        with pytest.raises(ValueError, match=r"^architecture must be a model type of transformers"):
            WaveformEncoder.create(name)
    with pytest.raises(ValueError, match="got the model type 'hubert'"):
        WaveformEncoder.create("hubert", TINY, pretrained=True)
    with pytest.raises(ValueError, match=r"^model_args must be fields of HubertConfig, got depth"):
        WaveformEncoder.create("hubert", {"depth": 1})
    with pytest.raises(ValueError, match=r"must make a HubertModel that can be built"):
        WaveformEncoder.create("hubert", {"hidden_size": 40})
