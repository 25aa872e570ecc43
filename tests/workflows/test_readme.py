"""The README's own commands and Python, run as written but for few steps and images."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from hub import WRITER, running_hub
from paired import write_captions, write_text_encoder
from workflow import ROOT, run, write_images

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.views.presets import PRESETS, find_recipes

README = (ROOT / "README.md").read_text()
CIFAR10 = ROOT / "../shared/data/cifar10"
SHORT = "--max_steps=2 --batch_size=16 --expander_dims=32-32"
FEW = {"train_split": "train[:1000]", "eval_split": "test[:200]"}
"""Of the 24,000 images of demo, all of which the kNN accuracy would see."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def trainings() -> list[str]:
    """Every command of the README that trains, in tables too, without the installation."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"\| `(accelerate launch [^`]*)`", README)
    commands = [line.split("&& ")[-1] for line in lines if "scripts/pretrain.py" in line]
    commands = [c for c in commands if "--preview" not in c and "--prime" not in c]
    return list(dict.fromkeys(commands))


def test_readme_shows_the_main_job_first() -> None:
    first = blocks("bash")[0]
    assert "pip install -e . && accelerate launch scripts/pretrain.py\n" in first


@pytest.mark.parametrize("command", trainings())
def test_training_commands_run(command: str, tmp_path: Path) -> None:
    if "cifar10" in command and not CIFAR10.is_dir():
        pytest.skip("CIFAR-10 is not beside the repository")
    if "path/or/hub-id" in command:
        folder = write_images(tmp_path / "images", rows=16, size=(60, 40))
        command = command.replace("path/or/hub-id", str(folder)) + " --image_size=64"
        command = command.replace("resnet50", "test_resnet")
    environment, words = {}, shlex.split(command)
    if not any(word.startswith(("--dataset_name", "--config")) for word in words):
        words += [f"--{setting}={part}" for setting, part in FEW.items()]
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    words += [*SHORT.split(), f"--output_dir={tmp_path / 'run'}"]
    with running_hub() as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER}
        if "--push_to_hub" in command:
            environment["HF_HUB_OFFLINE"] = "0"
        result = run(words, **environment)
    assert ("models/org/name" in hub.repositories) == ("--push_to_hub" in command)
    assert result.returncode == 0, result.stderr
    assert "The encoder is in" in result.stdout
    assert (tmp_path / "run" / "encoder" / "config.json").is_file()


def test_preview_is_drawn_as_shown(tmp_path: Path) -> None:
    (command,) = [line for block in blocks("bash") for line in block.splitlines()
                  if "--preview" in line]  # fmt: skip
    folder = write_images(tmp_path / "images", rows=16, size=(60, 40))
    command = command.replace("path/or/hub-id", str(folder))
    command = command.replace("views.png", str(tmp_path / "views.png"))
    result = run([*shlex.split(command), "--batch_size=16"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "views.png").is_file()


def test_recipe_of_views_is_one() -> None:
    (block,) = [block for block in blocks("yaml") if "preset" in block]
    x, x_prime, _ = find_recipes(yaml.safe_load(block))
    assert (x.flip, x.scale, x_prime.solarize) == (0, (0.3, 1.0), 0)
    assert x == replace(PRESETS["authors"][0], flip=0, scale=(0.3, 1.0))


@pytest.mark.parametrize(("name", "machines"), [("8-gpus", 1), ("4x8-gpus", 4)])
def test_accelerate_takes_its_configuration(name: str, machines: int) -> None:
    assert f"--config_file scripts/{name}.yaml" in README
    config: Any = load_config_from_file(str(ROOT / "scripts" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert config.mixed_precision == "bf16"


def test_python_loads_what_a_run_has_made(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    flags = f"--architecture=test_resnet --output_dir={tmp_path / 'runs/r50'} {SHORT}"
    made = run([sys.executable, "scripts/pretrain.py", f"--dataset_name={folder}", *flags.split()])
    assert made.returncode == 0, made.stderr
    loading = [block for block in blocks("python") if "runs/r50" in block]
    assert len(loading) == 3
    script = "".join(loading).replace("runs/r50", str(tmp_path / "runs/r50"))
    result = run([sys.executable, "-c", script])
    assert result.returncode == 0, result.stderr


def test_features_are_extracted_and_searched_as_shown(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[8])).save_pretrained(
        tmp_path / "encoder"
    )
    (command,) = [line for block in blocks("bash") for line in block.splitlines()
                  if "extract_features.py" in line]  # fmt: skip
    for word, path in {"org/name": "encoder", "path/or/hub-id": "images", "feats": "feats"}.items():
        command = command.replace(f" {word}", f" {tmp_path / path}")
    done = run(shlex.split(command))
    assert done.returncode == 0, done.stderr
    (block,) = [block for block in blocks("python") if "NearestNeighbors" in block]
    done = run([sys.executable, "-c", block.replace('"feats"', repr(str(tmp_path / "feats")))])
    assert done.returncode == 0, done.stderr
    assert "'0'" in done.stdout  # the nearest to an image is itself


def test_an_encoder_is_measured_as_shown(tmp_path: Path) -> None:
    write_images(tmp_path / "images", rows=220)
    model = VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[8]))
    model.save_pretrained(tmp_path / "encoder")
    (command,) = [line for block in blocks("bash") for line in block.splitlines()
                  if "evaluate.py" in line and "knn" in line]  # fmt: skip
    for word, path in {"org/name": "encoder", "path/or/hub-id": "images"}.items():
        command = command.replace(f" {word}", f" {tmp_path / path}")
    output = tmp_path / "out"
    done = run([*shlex.split(command), f"--output_dir={output}", f"--cache_dir={tmp_path}/cache"])
    assert done.returncode == 0, done.stderr
    protocols = {entry["protocol"] for entry in json.loads((output / "results.json").read_text())
                 ["results"]}  # fmt: skip
    assert protocols == {"knn", "linear", "retrieval"}
    assert (output / "report.html").is_file()


def test_measures_work_in_python_as_shown() -> None:
    (block,) = [block for block in blocks("python") if "linear_probe" in block]
    done = run([sys.executable, "-c", block])
    assert done.returncode == 0, done.stderr
    knn, linear, rank = map(float, done.stdout.split())
    assert 0 <= knn <= 1
    assert 0 <= linear <= 1
    assert 1 < rank <= 64


def test_python_interface_works_as_shown(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("python") if "PretrainingArguments" in block]
    script = block.replace(
        'output_dir="runs/demo"',
        f"output_dir={str(tmp_path)!r}, max_steps=2, batch_size=16, **{FEW!r}",
    )
    script = script.replace("image_size=224", "image_size=64")
    result = run([sys.executable, "-c", script])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "encoder" / "config.json").is_file()


def test_pairs_are_trained_and_measured_as_shown(tmp_path: Path) -> None:
    write_captions(tmp_path / "data", rows=64, test_rows=32)
    write_text_encoder(tmp_path / "bert")
    (block,) = [block for block in blocks("bash") if "cross-retrieval" in block]
    training, measuring = block.replace("\\\n", " ").splitlines()
    for word, other in {
        "path/or/hub-id": tmp_path / "data", "distilbert-base-uncased": tmp_path / "bert",
        "runs/pairs": tmp_path / "pairs", "resnet50": "test_resnet",
    }.items():  # fmt: skip
        training, measuring = (line.replace(word, str(other)) for line in (training, measuring))
    short = ["--expander_dims=16-16", "--batch_size=16", "--max_steps=2"]
    done = run([*shlex.split(training), *short])
    assert done.returncode == 0, done.stderr
    output = ["--prime_column=caption", f"--output_dir={tmp_path}/out", f"--cache_dir={tmp_path}/c"]
    done = run([*shlex.split(measuring), *output])
    assert done.returncode == 0, done.stderr
    for direction in ("images to caption", "caption to images"):
        for k in (1, 5, 10):
            assert f"{direction}, recall at {k}: " in done.stdout


def test_models_of_two_branches_are_made_as_shown() -> None:
    (block,) = [block for block in blocks("python") if "different = " in block]
    check = "assert shared.prime is None\nprint(separate.prime.num_features)\n"
    check += "print(different.prime.num_features)"
    done = run([sys.executable, "-c", block + check])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["512", "192"]
