"""Whole runs with two branches: trained, published, measured, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from hub import connected, running_hub
from paired import write_captions, write_clips, write_text_encoder, write_vectors
from transformers import AutoImageProcessor, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from warm import run_pretraining
from workflow import assert_same_run, flags_of, interrupt, metrics, train

from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.publishing.publish import publish
from vicreg_hf.settings.command_line import parse_evaluation_arguments

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")
LEARNING = [
    "--expander_dims=256-256-256", "--optimizer=adamw", "--base_lr=4e-3", "--logging_steps=50",
]  # fmt: skip
GENTLE = [
    "--batch_size=128", "--augmentation",
    '{"preset": "tiny", "flip": 0, "scale": [0.8, 1], "jitter": 0}',
]  # fmt: skip
WAVE = json.dumps(
    {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "conv_dim": [16, 16, 32], "conv_stride": [10, 8, 4],
        "conv_kernel": [10, 8, 4], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
)  # fmt: skip
KINDS: dict[str, tuple[Any, int, int, list[str]]] = {
    "caption": (write_captions, 1024, 80, [
        *GENTLE, "--prime_modality=text", "--prime_column=captions", "--prime_architecture=BERT",
    ]),
    "vector": (write_vectors, 1024, 60, [
        *GENTLE, "--prime_modality=embedding", "--prime_column=vector",
    ]),
    "sound": (write_clips, 1500, 200, [
        "--prime_modality=audio", "--prime_architecture=wav2vec2", f"--prime_model_args={WAVE}",
        "--batch_size=64", "--sampling_rate=8000", "--audio_seconds=1", "--image_size=48",
    ]),
}  # fmt: skip
"""By the column that images find: how data are written, rows, steps in which a run learns, and
its settings."""
CARDS = {
    "caption": ("| the first | `encoder`, `org/name` | the first view of images |",
                "| the second | `encoder_prime`, `org/name-prime` | texts of column"),
    "vector": ("not published",),
    "sound": ("log-mel spectrograms of 128 bands", "waveforms of column `sound`"),
}  # fmt: skip
"""Parts of the card of the first encoder."""


def recalls(output_dir: Path, data: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """What an evaluation finds of retrieval in both directions, by name."""
    flags = (
        f"--model={output_dir}", f"--dataset_name={data}", "--protocols=cross-retrieval",
        f"--output_dir={output_dir / 'evaluation'}", "--num_workers=0",
        f"--cache_dir={output_dir / 'cache'}", *flags,
    )  # fmt: skip
    results = evaluate(parse_evaluation_arguments(flags), say=lambda _: None)["results"]
    return {result["name"]: result for result in results}


@pytest.mark.parametrize("learns", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_what_belongs_to_them_find_each_other(
    kind: str, learns: bool, tmp_path: Path
) -> None:
    write, rows, steps, flags = KINDS[kind]
    rows, test_rows = (rows, 256) if learns else (64, 32)
    rate = {"rate": 8000} if kind == "sound" else {}
    data, out = write(tmp_path / "data", rows=rows, test_rows=test_rows, **rate), tmp_path / "run"
    bert = write_text_encoder(tmp_path / "bert")
    flags = [flag.replace("BERT", str(bert)) for flag in flags]
    own = [f"--max_steps={steps}"] if learns else ["--max_steps=2", "--batch_size=32"]
    train(data, out, *LEARNING, *flags, *own)
    found = recalls(out, data, *(["--prime_column=caption"] if kind == "caption" else []))
    for name in (f"images to {kind}", f"{kind} to images"):
        at_1, at_5 = (found[f"{name}, recall at {k}"] for k in (1, 5))
        assert at_1["num_images"] == test_rows
        assert at_1["value"] <= at_5["value"]
        if learns:  # ten times chance, on pairs that training has not seen
            assert at_1["value"] >= 10 * at_1["settings"]["chance"]
    card = (out / "encoder" / "README.md").read_text()
    assert all(part in card for part in CARDS[kind])
    assert str(tmp_path) not in (out / "encoder" / "config.json").read_text()
    assert type(AutoModel.from_pretrained(out / "encoder")).__name__ == "TimmWrapperModel"
    assert (out / "encoder_prime").exists() is (kind != "vector")
    if kind == "caption":
        several = recalls(out, data, "--prime_column=captions", f"--model={out / 'encoder'}")
        assert several["captions to images, recall at 1"]["num_images"] == test_rows
        second = out / "encoder_prime"
        model: Any = AutoModelForTextEncoding.from_pretrained(second)
        tokens = AutoTokenizer.from_pretrained(second)(["a red circle"], return_tensors="pt")
        assert model(**tokens).last_hidden_state.mean(1).shape == (1, 32)
        assert "It is the second of two branches" in (second / "README.md").read_text()


SECOND = ["--prime_architecture=test_vit", "--prime_image_size=48", "--prime_expander_dims=40-32"]


def test_another_architecture_is_trained_and_resumed(images: Path, tmp_path: Path) -> None:
    whole, flags = tmp_path / "whole", ["--max_steps=2", "--save_steps=1", "--warmup_epochs=0"]
    train(images, whole, *flags, *SECOND, "--num_local_views=1")
    last = metrics(whole)[-1]
    assert last["embedding_std_prime"] > 0
    assert 1 <= last["effective_rank_prime"] <= 32
    run = interrupt(whole, tmp_path / "run")
    train(images, run, *flags, *SECOND, "--num_local_views=1")
    assert_same_run(run, whole)
    with pytest.raises(CheckpointError, match="prime_architecture was test_vit, is None"):
        train(images, whole, *flags, "--weights=separate")


def test_the_first_step_of_two_processes_is_that_of_one(images: Path, tmp_path: Path) -> None:
    flags = [*SECOND, "--num_local_views=2", "--micro_batch_size=8", "--max_steps=1"]
    one = train(images, tmp_path / "one", *flags)[-1]
    done = run_pretraining(*flags_of(images, tmp_path / "two", *flags), processes=2)
    assert done.returncode == 0, done.stderr
    two = metrics(tmp_path / "two")[-1]
    for name in ("loss", "embedding_std", "embedding_std_prime"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    # one ReLU that rounding sets the other way is less than this, a wrong average much more
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_both_encoders_are_pushed_each_to_its_own_repository(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        pushed = ["--push_to_hub=true", "--hub_model_id=org/pair"]
        train(images, run, *SECOND, *pushed, "--max_steps=1")
        for name in ("org/pair", "org/pair-prime"):
            names = hub.repositories[f"models/{name}"].files().keys()
            assert {"README.md", "config.json", "model.safetensors"} <= names
            assert not any(name.startswith(("expander", "prime")) for name in names)
            assert timm.create_model(f"hf-hub:{name}", pretrained=True).num_classes == 0
            assert AutoImageProcessor.from_pretrained(name).data_config["input_size"]
        publish(run, "org/again", include_expander=True)
        card = hub.repositories["models/org/again-prime"].files()["README.md"].decode()
    assert "`org/again-prime`" in card
    assert "org/name" not in card
