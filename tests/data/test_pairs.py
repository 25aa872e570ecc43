"""Samples of two columns: read together, replaced together, drawn by their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from paired import write_captions, write_clips, write_text_encoder, write_vectors

from vicreg_hf import PretrainingArguments
from vicreg_hf.data import workers
from vicreg_hf.data.batches import training_views
from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.training.building.data import TrainingData, open_training_data
from vicreg_hf.training.building.model import build_model
from vicreg_hf.training.building.second_branch import create_views

CPU = torch.device("cpu")
TINY = {"architecture": "test_resnet", "expander_dims": "8-8", "batch_size": 8, "num_workers": 0}


def settled(folder: Path, **settings: Any) -> tuple[PretrainingArguments, TrainingData]:
    args = PretrainingArguments(
        dataset_name=str(folder), output_dir=str(folder / "out"), **TINY | settings
    )
    return open_training_data(args)


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions"), rows=24, test_rows=8)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("bert"))


def text(bert: Path, **settings: Any) -> dict[str, Any]:
    given = {"prime_modality": "text", "prime_architecture": str(bert), "prime_column": "caption"}
    return given | settings


def steps(
    args: PretrainingArguments, inputs: TrainingData, wanted: range, num_workers: int = 0
) -> list[tuple[Any, ...]]:
    model = build_model(args, inputs.pairs, sound=inputs.sound)
    views, paired = create_views(args, model.config, inputs.pairs)
    made = training_views(
        inputs.images, inputs.batches, views, steps=wanted, device=CPU, num_workers=num_workers,
        bad=inputs.bad, paired=paired,
    )  # fmt: skip
    return list(made)


def prime_of(args: PretrainingArguments, inputs: TrainingData) -> dict[str, Any]:
    """What the model's configuration says of the second branch."""
    prime = build_model(args, inputs.pairs, sound=inputs.sound).config.prime
    assert prime is not None
    return prime


def test_a_row_gives_its_own_caption(captions: Path, bert: Path) -> None:
    args, inputs = settled(captions, **text(bert))
    pairs: Any = inputs.pairs
    (x, tokens), *_ = steps(args, inputs, range(1))
    _, rows = inputs.batches.batch(0)
    table = datasets.load_dataset(str(captions), split="train")
    expected = pairs.column.tokenizer([table[int(row)]["caption"] for row in rows], padding=True)
    assert tokens["input_ids"].tolist() == expected["input_ids"]
    assert x.shape == (8, 3, 32, 32)


def test_starting_late_and_workers_change_nothing(captions: Path, bert: Path) -> None:
    args, inputs = settled(captions, **text(bert, prime_column="captions", num_local_views=2))
    every = steps(args, inputs, range(6))
    late = steps(args, inputs, range(3, 6), num_workers=1)
    for expected, found in zip(every[3:], late, strict=True):
        assert len(found) == 4
        assert expected[1].keys() == found[1].keys()
        assert all(torch.equal(expected[1][name], found[1][name]) for name in found[1])
        assert all(torch.equal(expected[view], found[view]) for view in (0, 2, 3))
    assert len({tuple(tokens["input_ids"][0].tolist()) for _, tokens, *_ in every}) > 1


def test_the_images_views_are_those_of_a_run_without_pairs(captions: Path, bert: Path) -> None:
    args, inputs = settled(captions, **text(bert, num_local_views=1))
    (x, _, local), *_ = steps(args, inputs, range(1))
    args, inputs = settled(captions, num_local_views=1)
    (expected, x_prime, small), *_ = steps(args, inputs, range(1))
    torch.testing.assert_close(x, expected, rtol=0, atol=0.02)  # in memory, and by a worker's crop
    torch.testing.assert_close(local, small, rtol=0, atol=0.05)
    assert not torch.allclose(x, x_prime)


def test_where_a_half_is_unusable_another_pair_takes_its_place(
    captions: Path, bert: Path, tmp_path: Path
) -> None:
    table = datasets.load_dataset(str(captions), split="train").cast_column(
        "picture", datasets.Image(decode=False)
    )
    rows = table.to_list()
    rows[3]["picture"], rows[5]["caption"] = {"bytes": b"no image", "path": None}, "  "
    (tmp_path / "broken").mkdir()
    broken = datasets.Dataset.from_list(rows, features=table.features)
    broken.to_parquet(tmp_path / "broken" / "train.parquet")
    _, inputs = settled(tmp_path / "broken", **text(bert, max_bad_fraction=0.5))
    pairs: Any = inputs.pairs
    found, bad = pairs.read_or_replace(range(24))
    assert [image.row for image in bad] == [3, 5]
    assert bad[1].reason == "the text is empty."
    for row in (3, 5):
        image, caption = found[row]
        others = [k for k in range(24) if k not in (3, 5) and torch.equal(found[k][0], image)]
        assert any(found[k][1] == caption for k in others)
    with pytest.raises(ImageError, match="row 3 of broken"):
        pairs.images.read([3])
    with pytest.raises(ImageError, match=r"row 5 of broken .*, columns picture and caption"):
        pairs.read([5])


def test_a_fingerprint_knows_what_belongs_to_the_images(captions: Path, bert: Path) -> None:
    _, one = settled(captions, **text(bert))
    _, other = settled(captions, **text(bert, prime_column="captions"))
    _, alone = settled(captions)
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint().items() > alone.fingerprint().items()


def test_vectors_come_as_they_are_and_need_room_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_vectors(tmp_path, rows=16, test_rows=8)
    args, inputs = settled(folder, prime_modality="embedding")
    (x, vectors), *_ = steps(args, inputs, range(1))
    table = datasets.load_dataset(str(tmp_path), split="train").with_format("torch")
    rows = inputs.batches.batch(0)[1]
    torch.testing.assert_close(vectors, table[rows.tolist()]["vector"].float())
    assert prime_of(args, inputs)["num_features"] == vectors.shape[1]

    room: list[int] = []
    monkeypatch.setattr(workers, "batches_ahead", lambda size, _: room.append(size) or 1)
    steps(args, inputs, range(1), num_workers=1)
    assert room == [x.numel() + vectors.nbytes]  # crops are uint8 until they are coloured


def test_sound_alone_is_seen_and_heard(tmp_path: Path) -> None:
    wave = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "conv_dim": [8, 8], "conv_stride": [5, 4],
            "conv_kernel": [10, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2}  # fmt: skip
    args, inputs = settled(
        write_clips(tmp_path, rows=16, test_rows=8, rate=8000), prime_modality="audio",
        prime_architecture="wav2vec2", prime_model_args=wave, sampling_rate=8000,
        audio_seconds=0.5, image_size=48,
    )  # fmt: skip
    (x, waves), *_ = steps(args, inputs, range(1))
    assert (x.shape, waves.shape) == ((8, 1, 48, 48), (8, 4000))
    assert args.augmentation == "audio"
    torch.testing.assert_close(waves.mean(1), torch.zeros(8), atol=1e-5, rtol=0)
    config = build_model(args, inputs.pairs, sound=inputs.sound).config
    assert config.spectrogram is not None
    assert config.spectrogram["sampling_rate"] == 8000


def test_spectrograms_may_stand_beside_images(tmp_path: Path, captions: Path) -> None:
    clips = datasets.load_dataset(
        str(write_clips(tmp_path / "clips", rows=24, test_rows=8)), split="train"
    ).cast_column("sound", datasets.Audio(decode=False))
    pictures = datasets.load_dataset(str(captions), split="train").select_columns(["picture"])
    both = datasets.concatenate_datasets([pictures, clips.select_columns(["sound"])], axis=1)
    both.to_parquet(tmp_path / "both" / "train.parquet")
    args, inputs = settled(
        tmp_path / "both", prime_modality="audio", prime_architecture="test_convnext",
        audio_seconds=1.0, prime_image_size=64,
    )  # fmt: skip
    (x, seen), *_ = steps(args, inputs, range(1))
    assert (x.shape, seen.shape) == ((8, 3, 32, 32), (8, 1, 64, 64))
    prime = prime_of(args, inputs)
    assert prime["preparation"]["seconds"] == 1.0
    assert prime["model_args"]["in_chans"] == 1


def test_images_of_two_columns_are_pairs_too(captions: Path, tmp_path: Path) -> None:
    table = datasets.load_dataset(str(captions), split="train").select_columns(["picture"])
    other = table.select(range(23, -1, -1)).rename_column("picture", "sketch")
    both = datasets.concatenate_datasets([table, other], axis=1)
    both.to_parquet(tmp_path / "train.parquet")
    args, inputs = settled(
        tmp_path, image_column="picture", prime_modality="image", prime_column="sketch",
        augmentation={"preset": "tiny", "scale": [1, 1], "ratio": [1, 1], "flip": 0, "jitter": 0,
                      "grayscale": 0},
    )  # fmt: skip
    (x, x_prime), *_ = steps(args, inputs, range(1))
    rows = inputs.batches.batch(0)[1]
    whole: Any = inputs.pairs
    swapped = {row: whole.images.read([23 - row])[0] for row in rows.tolist()}
    cfg = prime_of(args, inputs)["pretrained_cfg"]
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    for view, row in zip(x_prime, rows.tolist(), strict=True):
        torch.testing.assert_close(
            (view * std + mean) * 255, swapped[row].float(), rtol=0, atol=0.6
        )
    assert not torch.equal(x, x_prime)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prime_column": "colour"}, "of text, got 'colour'; columns of text: caption, captions"),
        ({"prime_column": None}, "prime_column must be given unless exactly one column .* got 2"),
        ({"prime_modality": "embedding", "prime_architecture": None, "prime_column": None},
         "exactly one column holds embedding, got 0; columns of embedding: none; all: pic"),
        ({"prime_tokenizer": "nowhere/to-be-found"}, "tokenizer must be a directory or a Hub id"),
    ],
)  # fmt: skip
def test_columns_and_tokenizers_that_are_not_there_are_refused(
    captions: Path, bert: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        settled(captions, **text(bert) | settings)
