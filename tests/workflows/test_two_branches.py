"""Whole runs with two branches: trained, published, measured, resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import online, running_hub
from paired import write_captions, write_clips, write_text_encoder, write_vectors
from warm import run_pretraining
from workflow import LIMIT, ROOT, SMALL, environment, metrics, run, write_images

from vicreg_hf import VICRegModel, pretrain
from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.settings.command_line import parse_arguments, parse_evaluation_arguments
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")
LEARNING = [
    "--architecture=test_resnet", "--expander_dims=256-256-256", "--optimizer=adamw",
    "--base_lr=4e-3", "--logging_steps=50", "--num_workers=0",
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


def recalls(output_dir: Path, data: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """What an evaluation finds of retrieval in both directions, by name."""
    flags = (
        f"--model={output_dir}", f"--dataset_name={data}", "--protocols=cross-retrieval",
        f"--output_dir={output_dir / 'evaluation'}", "--num_workers=0",
        f"--cache_dir={output_dir / 'cache'}", *flags,
    )  # fmt: skip
    results = evaluate(parse_evaluation_arguments(flags), say=lambda _: None)["results"]
    return {result["name"]: result for result in results}


def assert_learned(found: dict[str, dict[str, Any]], first: str, second: str) -> None:
    """Ten times chance in both directions, on pairs that training has not seen."""
    for name in (f"{first} to {second}", f"{second} to {first}"):
        at_1 = found[f"{name}, recall at 1"]
        assert at_1["value"] >= 10 * at_1["settings"]["chance"]
        assert at_1["value"] <= found[f"{name}, recall at 5"]["value"]
        assert found[f"{name}, recall at 5"]["value"] <= found[f"{name}, recall at 10"]["value"]


STOCK = """
import sys
sys.modules["vicreg_hf"] = None  # importing it fails
from pathlib import Path
import timm, torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForTextEncoding, AutoTokenizer
first, second, kind = sys.argv[1:]
at = "local-dir" if Path(first).is_dir() else "hf-hub"
encoder = AutoModel.from_pretrained(first)
assert type(encoder).__name__ == "TimmWrapperModel"
assert timm.create_model(f"{at}:{first}", pretrained=True).num_classes == 0
AutoImageProcessor.from_pretrained(first)
if kind == "text":
    model = AutoModelForTextEncoding.from_pretrained(second)
    tokens = AutoTokenizer.from_pretrained(second)(["a red circle"], return_tensors="pt")
    print(model(**tokens).last_hidden_state.mean(1).shape[1])
else:
    timm.create_model(f"{at}:{second}", pretrained=True)
    side = AutoImageProcessor.from_pretrained(second).data_config["input_size"]
    print(AutoModel.from_pretrained(second)(torch.zeros(1, *side)).pooler_output.shape[1])
"""


def stock(first: Path | str, second: Path | str, kind: str, **extra: str) -> int:
    """Load both encoders where vicreg_hf cannot be imported; features of the second."""
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(first), str(second), kind], env=environment(**extra),
        capture_output=True, text=True, timeout=LIMIT, check=False, cwd=ROOT / "tests/helpers",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_images_and_captions_find_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_captions(tmp_path / "captions", rows=1024, test_rows=256)
    bert, out = write_text_encoder(tmp_path / "bert"), tmp_path / "run"
    pretrain(parse_arguments([
        *LEARNING, *GENTLE, f"--dataset_name={data}", "--prime_modality=text",
        f"--prime_architecture={bert}", "--prime_column=captions", f"--output_dir={out}",
        "--max_steps=80",
    ]))  # fmt: skip
    assert "That of the second branch is in" in capsys.readouterr().out
    assert_learned(recalls(out, data, "--prime_column=caption"), "images", "caption")
    several = recalls(out, data, "--prime_column=captions", f"--model={out / 'encoder'}")
    assert several["captions to images, recall at 1"]["num_images"] == 256
    assert str(tmp_path) not in (out / "encoder" / "config.json").read_text()
    assert stock(out / "encoder", out / "encoder_prime", "text") == 32
    for directory in ("encoder", "encoder_prime"):
        card = (out / directory / "README.md").read_text()
        assert "| the first | `encoder`, `org/name` | the first view of images |" in card
        assert "| the second | `encoder_prime`, `org/name-prime` | texts of column" in card
    assert "It is the second of two branches" in (out / "encoder_prime" / "README.md").read_text()


@pytest.mark.slow
def test_images_find_the_vectors_they_were_aligned_with(tmp_path: Path) -> None:
    data, out = write_vectors(tmp_path / "data", rows=1024, test_rows=256), tmp_path / "run"
    pretrain(parse_arguments([
        *LEARNING, *GENTLE, f"--dataset_name={data}", "--prime_modality=embedding",
        "--prime_column=vector", f"--output_dir={out}", "--max_steps=60",
    ]))  # fmt: skip
    assert_learned(recalls(out, data), "images", "vector")
    assert not (out / "encoder_prime").exists()
    assert "not published" in (out / "encoder" / "README.md").read_text()


@pytest.mark.parametrize("steps", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_spectrograms_find_their_waveforms(tmp_path: Path, steps: int) -> None:
    rows, test_rows = (1500, 256) if steps > 2 else (64, 32)
    data = write_clips(tmp_path / "clips", rows=rows, test_rows=test_rows, rate=8000)
    out = tmp_path / "run"
    pretrain(parse_arguments([
        *LEARNING, "--batch_size=64", f"--dataset_name={data}", "--prime_modality=audio",
        "--prime_architecture=wav2vec2", f"--prime_model_args={WAVE}", "--sampling_rate=8000",
        "--audio_seconds=1", "--image_size=48", f"--output_dir={out}", f"--max_steps={steps}",
    ]))  # fmt: skip
    found = recalls(out, data)
    assert found["sound to images, recall at 1"]["num_images"] == test_rows
    if steps > 2:
        assert_learned(found, "images", "sound")
    card = (out / "encoder" / "README.md").read_text()
    assert "log-mel spectrograms of 128 bands" in card
    assert "waveforms of column `sound`" in card


SECOND = ["--prime_architecture=test_vit", "--prime_image_size=48", "--prime_expander_dims=40-32"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return VICRegModel.from_pretrained(run_dir / "encoder").state_dict()


@pytest.mark.slow
def test_another_architecture_is_trained_and_resumed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*SMALL, f"--dataset_name={images}", "--max_steps=4", "--save_steps=2",
              "--warmup_epochs=0"]  # fmt: skip
    flags = [*common, *SECOND, "--num_local_views=1"]
    pretrain(parse_arguments([*flags, f"--output_dir={whole}"]))
    assert "prime.backbone.patch_embed.proj.weight" in weights(whole)
    last = metrics(whole)[-1]
    assert last["embedding_std_prime"] > 0
    assert 1 <= last["effective_rank_prime"] <= 32
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("encoder*"))
    (parts / "checkpoints" / "step-4" / "manifest.json").write_text("{}")  # damaged
    pretrain(parse_arguments([*flags, f"--output_dir={parts}"]))
    assert "Resuming from" in capsys.readouterr().out
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=0, msg=name)
    with pytest.raises(CheckpointError, match="prime_architecture was test_vit, is None"):
        setup(parse_arguments([*common, "--weights=separate", f"--output_dir={whole}"]))


@pytest.mark.parametrize(
    "flags", [["--weights=separate"], [*SECOND, "--num_local_views=2", "--micro_batch_size=8"]]
)
def test_the_first_step_of_two_processes_is_that_of_one(
    images: Path, tmp_path: Path, flags: list[str]
) -> None:
    flags = [*SMALL, *flags, f"--dataset_name={images}", "--max_steps=1"]
    pretrain(parse_arguments([*flags, f"--output_dir={tmp_path / 'one'}"]))
    done = run_pretraining(*flags, f"--output_dir={tmp_path / 'two'}", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[-1]
    for name in ("loss", "embedding_std", "embedding_std_prime"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    # one ReLU that rounding sets the other way is less than this, a wrong average much more
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_both_encoders_are_pushed_each_to_its_own_repository(images: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        flags = [*SMALL, *SECOND, f"--dataset_name={images}", "--max_steps=2",
                 f"--output_dir={tmp_path / 'run'}"]  # fmt: skip
        done = run(
            [sys.executable, "scripts/pretrain.py", *flags, "--push_to_hub=true",
             "--hub_model_id=org/pair"], **online(hub, tmp_path / "home"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Published: ") == 2
        for name in ("org/pair", "org/pair-prime"):
            names = hub.repositories[f"models/{name}"].files().keys()
            assert {"README.md", "config.json", "model.safetensors"} <= names
            assert not any(name.startswith(("expander", "prime")) for name in names)
        assert stock("org/pair", "org/pair-prime", "image", **online(hub, tmp_path / "fresh"))
        again = run(
            [sys.executable, "scripts/publish.py", str(tmp_path / "run"), "--repo_id=org/again",
             "--include_expander"], **online(hub, tmp_path / "home"),
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        card = hub.repositories["models/org/again-prime"].files()["README.md"].decode()
        assert "`org/again-prime`" in card
        assert "org/name" not in card
