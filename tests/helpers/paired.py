"""Small data sets of pairs, made procedurally: images with captions or vectors, and sounds."""

from __future__ import annotations

import io
from collections.abc import Callable
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
ROWS, SIDES = ("top", "middle", "bottom"), ("left", "middle", "right")
SIZES = {"small": 3.6, "large": 5.4}
"""Radius in pixels."""
FACTORS = (COLOURS, SHAPES, ROWS, SIDES, SIZES)
SIDE = 32
"""Of an image, in pixels."""
WIDTH = 16
"""Of a vector."""
TIMBRES = ("sine", "square", "sawtooth")


def draw(count: int, rng: np.random.Generator) -> tuple[list[tuple[str, ...]], list[Any]]:
    """A word for each of the factors of each image, and the coloured shapes on noise, as PNG."""
    numbers = [rng.integers(len(choices), size=count) for choices in FACTORS]
    shown, pictures = [], []
    for own in zip(*numbers, strict=True):
        words = tuple(list(k)[number] for k, number in zip(FACTORS, own, strict=True))
        colour, shape, _, _, size = words
        centre = (6 + 10 * np.array(own[2:4]))[:, None, None] + rng.uniform(-1, 1)
        y, x = (np.mgrid[0:SIDE, 0:SIDE].astype(float) - centre) / SIZES[size]
        pixels = rng.normal(90, 20, (SIDE, SIDE, 3))
        inside = SHAPES[shape](y, x)
        pixels[inside] = COLOURS[colour] + rng.normal(0, 12, (inside.sum(), 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        shown.append(words)
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    return shown, pictures


def write_captions(folder: Path, **sizes: int) -> Path:
    """Columns `picture`; `caption`, a string; `captions`, one or two."""

    def columns(count: int, rng: np.random.Generator) -> dict[str, Any]:
        shown, pictures = draw(count, rng)
        what = [f"{size} {colour} {shape}" for colour, shape, _, _, size in shown]
        where = [f"the {row} {side}" for _, _, row, side, _ in shown]
        first = [f"a {a} at {b}" for a, b in zip(what, where, strict=True)]
        other = [f"in {b} there is a {a}" for a, b in zip(what, where, strict=True)]
        both = zip(first, other, strict=True)
        captions = [list(pair[: 1 + k % 2]) for k, pair in enumerate(both)]
        return {"picture": pictures, "caption": first, "captions": captions}

    text = datasets.Value("string")
    kinds = {"picture": datasets.Image(), "caption": text, "captions": datasets.List(text)}
    return _write(folder, columns, kinds, **sizes)


def write_vectors(folder: Path, **sizes: int) -> Path:
    """Columns `picture`; `vector`, a fixed random projection of its factors."""
    directions = [np.random.default_rng(n).normal(0, 1, (len(k), WIDTH))
                  for n, k in enumerate(FACTORS)]  # fmt: skip

    def columns(count: int, rng: np.random.Generator) -> dict[str, Any]:
        shown, pictures = draw(count, rng)
        numbers = np.array([[list(k).index(w) for k, w in zip(FACTORS, words, strict=True)]
                            for words in shown])  # fmt: skip
        vectors = sum(d[column] for d, column in zip(directions, numbers.T, strict=True))
        noise = rng.normal(0, 0.05, (count, WIDTH))
        return {"picture": pictures, "vector": (vectors + noise).astype(np.float32)}

    vector = datasets.List(datasets.Value("float32"), length=WIDTH)
    return _write(folder, columns, {"picture": datasets.Image(), "vector": vector}, **sizes)


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


def write_clips(folder: Path, *, rate: int = 16_000, **sizes: int) -> Path:
    """Columns `sound`, a second of WAV each, and `kind`, one of 12 classes; rate in Hz."""

    def columns(count: int, rng: np.random.Generator) -> dict[str, Any]:
        kinds = rng.integers(12, size=count)
        return {"sound": [encode_sound(tone(int(kind), rate, rng), rate) for kind in kinds],
                "kind": kinds}  # fmt: skip

    names = [
        f"{TIMBRES[kind % 3]} {('low', 'high')[kind // 3 % 2]} {('steady', 'beating')[kind // 6]}"
        for kind in range(12)
    ]
    kinds = {"sound": datasets.Value("binary"), "kind": datasets.ClassLabel(names=names)}
    return _write(folder, columns, kinds, **sizes)


def encode_sound(samples: NDArray[Any], rate: int, kind: str = "WAV", **options: Any) -> bytes:
    """A sound file of (L,) or (L, channels) samples."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the captions, between [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {"a", "at", "the", "in", "there", "is"}.union(*FACTORS)
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


def _write(
    folder: Path, columns: Callable[..., dict[str, Any]], kinds: dict[str, Any], *,
    rows: int = 64, test_rows: int = 32, seed: int = 0,
) -> Path:  # fmt: skip
    """A parquet data set, whose splits are made from their numbers of rows and a generator."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate({"train": rows, "test": test_rows}.items()):
        made = columns(count, np.random.default_rng([seed, number]))
        table = datasets.Dataset.from_dict(made, features=datasets.Features(kinds))
        if "sound" in kinds:  # made as Audio at once, it would be encoded by torchcodec
            table = table.cast_column("sound", datasets.Audio())
        table.to_parquet(folder / f"{split}.parquet")
    return folder
