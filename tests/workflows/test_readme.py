"""The commands and the Python of every README, run as written but for few steps and images."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from hub import WRITER, running_hub
from paired import write_captions, write_text_encoder
from warm import run_script
from workflow import ROOT, run, write_images

from vicreg_hf.views.presets import PRESETS, find_recipes

FILES = [
    file for file in (ROOT / "README.md", *sorted(ROOT.glob("[!.]*/**/README.md")))
    if file.parts[-2] != "demo"  # a model card, which stock loaders run
]  # fmt: skip
DOCUMENTS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
SHORT = ["--max_steps=2", "--batch_size=16", "--expander_dims=32-32"]
SMALLER = {
    "resnet50": "test_resnet", "resnet18": "test_resnet", "convnext_tiny": "test_convnext",
    "vit_tiny_patch16_224": "test_vit", "2048, 2048, 2048": "64", "[256, 512]": "[64, 512]",
    "image_size=224": "image_size=64", "max_steps=100": "max_steps=4", "256, 2048": "256, 64",
    "max_steps=500": "max_steps=2", "512-512-512": "32", "STRIDE, QUERY = 96, 24, (1, 48, 240)":
    "STRIDE, QUERY = 96, 80, (1, 80, 240)", "batch_size=128": "batch_size=16",
}  # fmt: skip
"""Parts of the documents' Python, and what stands in for them so that it runs in seconds."""


def blocks(language: str) -> list[str]:
    found = [
        re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for text in DOCUMENTS.values()
    ]
    return list(itertools.chain.from_iterable(found))


def commands(part: str) -> list[str]:
    """The documents' commands with this in them, in blocks and in tables, without installation."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    for text in DOCUMENTS.values():
        lines += re.findall(r"\| `(accelerate launch [^`]*)`", text)
    found = [line.split("&& ")[-1] for line in lines if part in line]
    return list(dict.fromkeys(found))


def python_with(part: str) -> str:
    (block,) = [block for block in blocks("python") if part in block]
    return block


def replaced(text: str, others: dict[str, Any]) -> str:
    for word, other in others.items():
        text = text.replace(word, str(other))
    return text


def run_command(command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has its imports, and make sure that it ends well."""
    words = shlex.split(command)
    result = run_script(*words[words.index(next(w for w in words if "scripts/" in w)) :], *more)
    assert result.returncode == 0, result.stderr
    return result


def run_python(script: str, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    result = run_script(str(folder / "script.py"))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", rows=32, size=(60, 40))


def test_the_first_readme_shows_the_main_job_first_and_is_short() -> None:
    text = DOCUMENTS["README.md"]
    first = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0]
    assert first.endswith("pip install -e . && accelerate launch scripts/pretrain.py\n")
    assert len(text.splitlines()) <= 200
    assert str(metadata("vicreg-hf").json["description"]).startswith("# vicreg_hf")  # PyPI's page


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", DOCUMENTS[name]):
        file, _, heading = target.partition("#")
        place = (folder / file).resolve() if file else ROOT / name
        assert place.exists(), f"{name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}
            assert heading in anchors, f"{name} links to {target}"


TRAININGS = [
    command
    for command in commands("scripts/pretrain.py")
    if not any(part in command for part in ("--preview", "--prime", "--push_to_hub"))
]
"""The commands that train, without those that a test below runs."""


@pytest.mark.parametrize("command", TRAININGS)
def test_training_commands_run(command: str, tmp_path: Path, images: Path) -> None:
    small = {"path/or/hub-id": images, "../shared/data/cifar10": images, "resnet50": "test_resnet"}
    words = shlex.split(replaced(command, small))
    if not any(word.startswith("--dataset_name") for word in words):  # of demo's 24,000 images
        words += ["--train_split=train[:1000]", "--eval_split=test[:200]"]
    if "--architecture" not in command and "--config" not in command:
        words += ["--architecture=test_resnet"]
    words += [*SHORT, "--image_size=32", f"--output_dir={tmp_path / 'run'}"]
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    if words[:2] == ["accelerate", "launch"] and len(command.split()) > 3:
        result = run_script(*words[2:])  # without another launcher, whose start takes seconds
    else:
        result = run(words, **environment)
    assert result.returncode == 0, result.stderr
    assert "The encoder is in" in result.stdout
    assert (tmp_path / "run" / "encoder" / "config.json").is_file()


def test_preview_is_drawn(tmp_path: Path, images: Path) -> None:
    (command,) = commands("--preview")
    places = {"path/or/hub-id": images, "views.png": tmp_path / "views.png"}
    run_command(replaced(command, places), "--batch_size=16")
    assert (tmp_path / "views.png").is_file()


def test_a_run_is_measured_and_searched_and_its_encoder_loaded(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", rows=220)
    trained = tmp_path / "r50"
    settings = ["--architecture=test_resnet", *SHORT]
    run_command(f"scripts/pretrain.py --dataset_name {images} --output_dir {trained}", *settings)
    places = {
        "path/or/hub-id": images,
        "--model org/name": f"--model {trained}",
        "runs/r50": trained,
        "output_dir feats": f"output_dir {tmp_path / 'feats'}",
    }
    measuring = [c for c in commands("evaluate.py") if "cross-retrieval" not in c]
    (command,) = {replaced(command, places) for command in measuring}
    run_command(command, f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}")
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {entry["protocol"] for entry in results} == {"knn", "linear", "retrieval"}
    (command,) = commands("extract_features.py")
    run_command(replaced(command, places))
    search = python_with("NearestNeighbors").replace('"feats"', repr(str(tmp_path / "feats")))
    assert "'0'" in run_python(search, tmp_path)  # the nearest to an image is itself
    loading = [block for block in blocks("python") if "runs/r50" in block]
    assert len(loading) == 3
    run_python(replaced("".join(loading), places), tmp_path)


@pytest.mark.slow
def test_an_encoder_is_published(tmp_path: Path, images: Path) -> None:
    run_dir = tmp_path / "r50"
    with running_hub() as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0"}
        (training,) = commands("--push_to_hub")
        words = shlex.split(training.replace("path/or/hub-id", str(images)))
        words += ["--architecture=test_resnet", "--image_size=32", *SHORT]
        done = run([*words, f"--output_dir={run_dir}"], **online)
        assert done.returncode == 0, done.stderr
        assert len(hub.repositories.pop("models/org/name").commits) == 2  # the first is empty
        (publishing,) = commands("scripts/publish.py")
        done = run(shlex.split(publishing.replace("runs/r50", str(run_dir))), **online)
        assert done.returncode == 0, done.stderr
        assert "models/org/name" in hub.repositories


def test_a_checkpoint_of_other_code_is_converted(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    torch.save(state, tmp_path / "resnet50.pth")
    (command,) = commands("convert_checkpoint.py")
    places = {"resnet50.pth": tmp_path / "resnet50.pth", "converted/": tmp_path / "converted"}
    run_command(replaced(command, places))
    assert (tmp_path / "converted" / "config.json").is_file()


def test_pairs_are_trained_and_measured(tmp_path: Path) -> None:
    write_captions(tmp_path / "data", rows=64, test_rows=32)
    write_text_encoder(tmp_path / "bert")
    places = {"path/or/hub-id": tmp_path / "data", "distilbert-base-uncased": tmp_path / "bert",
              "runs/pairs": tmp_path / "pairs", "resnet50": "test_resnet"}  # fmt: skip
    (training,), (measuring,) = commands("--prime_modality"), commands("cross-retrieval")
    run_command(replaced(training, places), *SHORT)
    output = ["--prime_column=caption", f"--output_dir={tmp_path}/out", f"--cache_dir={tmp_path}/c"]
    said = run_command(replaced(measuring, places), *output).stdout
    for direction, k in itertools.product(("images to caption", "caption to images"), (1, 5, 10)):
        assert f"{direction}, recall at {k}: " in said


STANDALONE = [
    block for block in blocks("python")
    if not any(word in block for word in ("runs/r50", "NearestNeighbors"))
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(STANDALONE)))
def test_python_runs_as_shown(number: int, tmp_path: Path) -> None:
    few = {'output_dir="runs/demo"': f"output_dir={str(tmp_path)!r}, max_steps=2, batch_size=16, "
           'train_split="train[:1000]", eval_split="test[:200]"'}  # fmt: skip
    script = replaced(STANDALONE[number], SMALLER | few)
    assert script != STANDALONE[number] or "linear_probe" in script
    run_python(script.replace('"runs/', f'"{tmp_path}/'), tmp_path)


def test_the_recipe_of_views_is_one() -> None:
    (block,) = [block for block in blocks("yaml") if "preset" in block]
    x, x_prime, _ = find_recipes(yaml.safe_load(block))
    assert (x.flip, x.scale, x_prime.solarize) == (0, (0.3, 1.0), 0)
    assert x == replace(PRESETS["authors"][0], flip=0, scale=(0.3, 1.0))


@pytest.mark.parametrize(("name", "machines"), [("8-gpus", 1), ("4x8-gpus", 4)])
def test_accelerate_takes_its_configuration(name: str, machines: int) -> None:
    assert f"--config_file scripts/{name}.yaml" in DOCUMENTS["scripts/README.md"]
    config: Any = load_config_from_file(str(ROOT / "scripts" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert config.mixed_precision == "bf16"
