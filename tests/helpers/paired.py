"""Small data sets of pairs, made procedurally: images with captions or vectors, and sounds."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 220, 50),
    "purple": (150, 50, 190), "orange": (240, 140, 30), "white": (245, 245, 245),
    "cyan": (50, 210, 220),
}  # fmt: skip
SHAPES: dict[str, Callable[[Any, Any], Any]] = {  # of distances from the centre, over the radius
    "circle": lambda y, x: y**2 + x**2 <= 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) <= 0.9,
    "triangle": lambda y, x: (abs(y) <= 1) & (abs(x) <= (y + 1) / 2),
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) <= 0.35) & (np.maximum(abs(y), abs(x)) <= 1),
}
SIZES = {"small": 3.6, "large": 5.4}
"""Radius in pixels."""
ROWS, SIDES = ("top", "middle", "bottom"), ("left", "middle", "right")
SIDE = 32
"""Of an image, in pixels."""
WIDTH = 16
"""Of a vector."""
TIMBRES = ("sine", "square", "sawtooth")
Factors = dict[str, NDArray[np.int64]]


def draw_factors(count: int, rng: np.random.Generator) -> Factors:
    """What each image shows, by number: colour, shape, row, side, size."""
    kinds = {"colour": COLOURS, "shape": SHAPES, "row": ROWS, "side": SIDES, "size": SIZES}
    return {name: rng.integers(len(choices), size=count) for name, choices in kinds.items()}


def draw_images(factors: Factors, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A coloured shape on noise each, as PNG."""
    grid = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    images = []
    for colour, shape, row, side, size in zip(*factors.values(), strict=True):
        centre = np.array([6 + 10 * row, 6 + 10 * side])[:, None, None] + rng.uniform(-1, 1)
        y, x = (grid - centre) / list(SIZES.values())[size]
        pixels = rng.normal(90, 20, (SIDE, SIDE, 3))
        inside = list(SHAPES.values())[shape](y, x)
        pixels[inside] = list(COLOURS.values())[colour] + rng.normal(0, 12, (inside.sum(), 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return images


def captions_of(factors: Factors) -> list[list[str]]:
    """Two paraphrases of each image: "a small red circle at the top left", and another order."""
    found = []
    for colour, shape, row, side, size in zip(*factors.values(), strict=True):
        what = f"{list(SIZES)[size]} {list(COLOURS)[colour]} {list(SHAPES)[shape]}"
        place = f"the {ROWS[row]} {SIDES[side]}"
        found.append([f"a {what} at {place}", f"in {place} there is a {what}"])
    return found


def write_captions(folder: Path, *, rows: int = 64, test_rows: int = 32, seed: int = 0) -> Path:
    """Columns `picture`; `caption`, a string; `captions`, one or two; `shape`, a class."""
    for split, rng, count in _splits(rows, test_rows, seed):
        factors = draw_factors(count, rng)
        both = captions_of(factors)
        columns = {
            "picture": draw_images(factors, rng),
            "caption": [first for first, _ in both],
            "captions": [pair[: 1 + k % 2] for k, pair in enumerate(both)],
            "shape": factors["shape"],
        }
        text = datasets.Value("string")
        features = {"caption": text, "captions": datasets.List(text), "shape": _classes(SHAPES)}
        _write(folder, split, columns, {"picture": datasets.Image()} | features)
    return folder


def write_vectors(folder: Path, *, rows: int = 64, test_rows: int = 32, seed: int = 0) -> Path:
    """Columns `picture`; `vector`, a fixed random network's view of its factors; `shape`."""
    fixed = np.random.default_rng(1234)
    sizes = [len(COLOURS) + len(SHAPES) + len(ROWS) + len(SIDES) + len(SIZES), 64, WIDTH]
    weights = [fixed.normal(0, a**-0.5, (a, b)) for a, b in pairwise(sizes)]
    for split, rng, count in _splits(rows, test_rows, seed):
        factors = draw_factors(count, rng)
        kinds = (COLOURS, SHAPES, ROWS, SIDES, SIZES)
        coded = np.concatenate(
            [np.eye(len(k))[numbers] for k, numbers in zip(kinds, factors.values(), strict=True)], 1
        )
        vectors = np.tanh(3 * coded @ weights[0]) @ weights[1]
        columns = {
            "picture": draw_images(factors, rng),
            "vector": (vectors + rng.normal(0, 0.05, vectors.shape)).astype(np.float32),
            "shape": factors["shape"],
        }
        vector = datasets.List(datasets.Value("float32"), length=WIDTH)
        features = {"picture": datasets.Image(), "vector": vector, "shape": _classes(SHAPES)}
        _write(folder, split, columns, features)
    return folder


def tone(kind: int, rate: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A second of one of 12 kinds: timbre, high or low, steady or beating; noise, and any phase."""
    timbre, high, beating = TIMBRES[kind % 3], kind // 3 % 2, kind // 6 % 2
    seconds = np.arange(rate) / rate
    pitch = (900 if high else 220) * 2 ** rng.uniform(-0.15, 0.15)
    phase = (pitch * seconds + rng.uniform()) % 1
    wave = {
        "sine": np.sin(2 * np.pi * phase), "square": np.sign(0.5 - phase), "sawtooth": 2 * phase - 1
    }[timbre]  # fmt: skip
    if beating:
        wave = wave * ((8 * seconds + rng.uniform()) % 1 < 0.5)
    return (0.3 * wave + rng.normal(0, 0.02, rate)).astype(np.float32)


def write_clips(
    folder: Path, *, rows: int = 64, test_rows: int = 32, rate: int = 16_000, seed: int = 0
) -> Path:
    """Columns `sound`, a second of WAV each, and `kind`, one of 12 classes; rate in Hz."""
    names = [
        f"{TIMBRES[kind % 3]} {('low', 'high')[kind // 3 % 2]} {('steady', 'beating')[kind // 6]}"
        for kind in range(12)
    ]
    for split, rng, count in _splits(rows, test_rows, seed):
        kinds = rng.integers(12, size=count)
        columns = {
            "sound": [encode_sound(tone(int(kind), rate, rng), rate) for kind in kinds],
            "kind": kinds,
        }
        features = {"sound": datasets.Value("binary"), "kind": _classes(names)}
        _write(folder, split, columns, features, audio="sound")
    return folder


def encode_sound(samples: NDArray[Any], rate: int, kind: str = "WAV", **options: Any) -> bytes:
    """A sound file of (L,) or (L, channels) samples."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the captions, between [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {"a", "at", "the", "in", "there", "is", *COLOURS, *SHAPES, *SIZES, *ROWS, *SIDES}
    vocabulary = {word: number for number, word in enumerate(special + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def write_text_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A tiny BERT of random weights with a tokenizer of the captions' words, as stock files."""
    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=64, max_position_embeddings=32,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _splits(rows: int, test_rows: int, seed: int) -> list[tuple[str, np.random.Generator, int]]:
    counts = {"train": rows, "test": test_rows}
    return [(k, np.random.default_rng([seed, n]), counts[k]) for n, k in enumerate(counts)]


def _classes(names: Any) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=list(names))


def _write(
    folder: Path, split: str, columns: Any, features: Any, *, audio: str | None = None
) -> None:
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if audio is not None:  # made as Audio at once, it would be encoded by torchcodec
        table = table.cast_column(audio, datasets.Audio())
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{split}.parquet")
