"""The commands and the Python of every README, run as written but for few steps and images."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from datasets import Dataset
from hub import connected, running_hub
from paired import write_captions, write_text_encoder
from scenes import write_boxes, write_scenes
from warm import run_script
from workflow import ROOT, run, write_images

from vicreg_hf import pretrain
from vicreg_hf.commands.__main__ import main
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.views.presets import PRESETS, find_recipes

pytestmark = pytest.mark.usefixtures("one_core")

OURS = ("model_cards", "scripts", "vicreg_hf")  # not runs/, where users train
FOUND = [file for folder in OURS for file in sorted((ROOT / folder).rglob("README.md"))]
FILES = [ROOT / "README.md", *(file for file in FOUND if file.parts[-2] != "demo")]  # a card
DOCUMENTS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
SHORT = ["--max_steps=1", "--batch_size=16", "--expander_dims=32-32", "--image_size=32",
         "--compile=false"]  # fmt: skip
SMALLER = {
    "resnet50": "test_resnet", "resnet18": "test_resnet", "convnext_tiny": "test_convnext",
    "vit_tiny_patch16_224": "test_vit", "2048, 2048, 2048": "64", "[256, 512]": "[64, 512]",
    "image_size=224": "image_size=64", "max_steps=100": "max_steps=4", "256, 2048": "256, 64",
    "max_steps=500": "max_steps=2", "512-512-512": "32", "STRIDE, QUERY = 96, 24, (1, 48, 240)":
    "STRIDE, QUERY = 96, 80, (1, 80, 240)", "batch_size=128": "batch_size=16",
    "_steps=50": "_steps=2", "7, 7, 512": "3, 3, 8",
}  # fmt: skip
"""Parts of the documents' Python, and what stands in for them so that it runs in seconds."""


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [block for text in DOCUMENTS.values() for block in pattern.findall(text)]


def all_commands() -> list[str]:
    """The documents' commands, in blocks and in tables, without installation."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    for text in DOCUMENTS.values():
        lines += re.findall(r"\| `(accelerate launch [^`]*)`", text)
    ours = [line for line in lines if "scripts/" in line or line.startswith("vicreg-hf ")]
    found = [line.split("&& ")[-1] for line in ours]
    return list(dict.fromkeys(c.replace("--model org/name", "--model runs/r50") for c in found))


COMMANDS = all_commands()
TRAININGS = [c for c in COMMANDS if "pretrain.py" in c and "--output_dir runs/" in c]
"""The commands whose runs others take."""
ON_THE_HUB = [c for c in COMMANDS if "publish.py" in c or "--push_to_hub" in c]
EXTRACTING = [c for c in COMMANDS if "extract_features.py" in c]
SEARCHING = [c for c in COMMANDS if c.startswith("vicreg-hf search")]
AS_A_SPACE = [c for c in COMMANDS if "--space" in c]
APART = (*TRAININGS, *ON_THE_HUB, *EXTRACTING, *SEARCHING, *AS_A_SPACE)
OTHERS = [c for c in COMMANDS if c not in APART]


def replaced(text: str, others: dict[str, Any]) -> str:
    for word, other in others.items():
        text = text.replace(word, str(other))
    return text


def filled(command: str, folder: Path) -> list[str]:
    """The words of a command, on what is in the folder."""
    paired = "prime" in command or "cross-retrieval" in command
    data = "scenes" if "segmentation" in command else "pairs" if paired else "images"
    return shlex.split(replaced(command, {
        "path/or/hub-id": folder / data, "runs/": f"{folder}/runs/",
        "../shared/data/cifar10": folder / "images", "distilbert-base-uncased": folder / "bert",
        "names.txt": folder / "names.txt", "image_size 512": "image_size 64",
        "views.png": folder / "views.png", "resnet50.pth": folder / "weights.pth",
        "converted/": folder / "converted", "exported/": folder / "exported",
        "--features feats": f"--features {folder}", "new.jpg": folder / "new.png",
        "vicreg-hf": "vicreg_hf/commands/__main__.py", "resnet50": "test_resnet",
        "dir feats": f"dir {folder}", "hits.html": folder / "hits.html",
        "publish feats": f"publish {folder}",
    }))  # fmt: skip


def run_words(words: list[str], *more: str) -> str:
    """Run a script in a process that has its imports, and make sure that it ends well."""
    begin = next(k for k, word in enumerate(words) if word.endswith(".py"))
    result = run_script(*words[begin:], *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_python(script: str, folder: Path) -> str:
    (folder / "script.py").write_text(script)
    return run_words([str(folder / "script.py")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, pairs and the runs on them, and what else the commands take."""
    folder = tmp_path_factory.mktemp("readme")
    write_images(folder / "images", rows=220)
    write_captions(folder / "pairs")
    write_text_encoder(folder / "bert")
    write_scenes(folder / "scenes", {"train": 8, "test": 4})
    (folder / "names.txt").write_text("\n".join(f"class {k}" for k in range(8)))
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), folder / "weights.pth")
    for command in TRAININGS:
        assert "The encoder is in" in run_words(filled(command, folder), *SHORT)
    return folder


def test_the_first_readme_shows_the_main_job_first_and_is_short() -> None:
    text = DOCUMENTS["README.md"]
    first = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0]
    start = "accelerate launch --config_file scripts/1-process.yaml scripts/pretrain.py\n"
    assert first.endswith(f"pip install -e . && {start}")
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


MADE = {"--preview": "views.png", "pretrain": "out/encoder/config.json",
        "evaluate": "out/results.json", "convert": "converted/config.json",
        "export": "exported/onnx/model.onnx"}  # fmt: skip
"""What a command leaves, by a part of it."""


@pytest.mark.parametrize("command", OTHERS)
def test_commands_run(command: str, folder: Path) -> None:
    words, more = filled(command, folder), [f"--output_dir={folder / 'out'}"]
    made = folder / next(file for part, file in MADE.items() if part in command)
    if "pretrain.py" in command:
        more += [*SHORT, "--resume=never"]
    if "evaluate.py" in command:
        more += [f"--cache_dir={folder / 'cache'}", "--prime_column=caption"]
    if words[-1] != "scripts/pretrain.py":  # no second start of a launcher, which takes seconds
        run_words(words, *([] if "convert" in command or "export" in command else more))
    else:
        environment = {}
        while "=" in words[0]:
            name, _, environment[name] = words.pop(0).partition("=")
        of_demo = ["--train_split=train[:1000]", "--eval_split=test[:200]"]
        # all of its images are drawn, and for one of the commands
        data = ["--config=demo", f"--dataset_name={folder / 'images'}"] if environment else of_demo
        result = run([*words, *more, *data], **environment)
        assert result.returncode == 0, result.stderr
    assert made.is_file()
    made.unlink()


def test_features_are_searched_and_published(folder: Path, tmp_path: Path) -> None:
    (command,) = EXTRACTING
    run_words(filled(command, folder))
    (search,) = (block for block in blocks("python") if "NearestNeighbors" in block)
    printed = run_python(search.replace('"feats"', f'"{folder}"'), folder)
    assert "'0'" in printed  # the nearest to an image is itself
    table = Dataset.from_parquet(str(folder / "images" / "test.parquet"))
    table[3]["picture"].save(folder / "new.png")
    (command,) = SEARCHING
    found = run_words(filled(command, folder)).splitlines()
    assert found[0] == str(folder / "new.png")
    assert found[1].split()[:3] == ["1.0000", "test", "3"]
    assert found[9:] == ["", f"Written: {folder / 'hits.html'}"]
    (command,) = AS_A_SPACE
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        main(filled(command, folder)[1:])
    assert "features/test-00000-of-00001.safetensors" in hub.repositories["spaces/org/name"].files()


def test_an_encoder_is_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        for command in ON_THE_HUB:
            words = filled(command, folder)
            if "scripts/publish.py" in words:
                monkeypatch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
            else:
                own = ["--architecture=test_resnet", *SHORT, f"--output_dir={tmp_path / 'run'}"]
                pretrain(parse_arguments([*words[3:], *own]))
            repository = hub.repositories.pop("models/org/name")
            assert len(repository.commits) == 2  # the first is empty


STANDALONE = [
    block for block in blocks("python")
    if not any(word in block for word in ("runs/r50", "NearestNeighbors", "../shared/"))
]  # fmt: skip
(DETECTION,) = (block for block in blocks("python") if "COCOeval" in block)
ON_A_RUN = "".join(b for b in blocks("python") if "runs/r50" in b and b != DETECTION)


@pytest.mark.parametrize("number", range(len(STANDALONE) + 1))
def test_python_runs_as_shown(number: int, folder: Path, tmp_path: Path) -> None:
    given = [*STANDALONE, ON_A_RUN][number]
    few = {
        'output_dir="runs/demo"': f'output_dir="{tmp_path}", dataset_name="{folder}/images", '
        "max_steps=2, batch_size=16", "runs/r50": f"{folder}/runs/r50",
        'output_dir="runs/barlow"': f'output_dir="runs/barlow", dataset_name="{folder}/images"',
    }  # fmt: skip
    script = replaced(given, SMALLER | few)
    assert script != given or "linear_probe" in script
    run_python(script.replace('"runs/', f'"{tmp_path}/'), tmp_path)


DATA = ROOT.parent / "shared" / "data"
BLOOD = DATA / "bccd"


def test_images_are_cut_as_for_the_table_of_the_recipes(tmp_path: Path) -> None:
    if not (BLOOD.is_dir() and (DATA / "camvid").is_dir()):
        pytest.skip("needs ../shared/data/bccd and camvid, which are not here")
    (script,) = (block for block in blocks("python") if "np.bincount" in block)
    few = {
        "../shared/data": DATA,
        "split=split)": "split=f'{split}[:3]')",
        'f"cells': f'f"{tmp_path}/cells',
        'f"tiles': f'f"{tmp_path}/tiles',
    }
    run_python(replaced(script, few), tmp_path)
    for kind in ("cells/train/0", "cells/test/0", "tiles/train/road", "tiles/test/sky"):
        assert next((tmp_path / kind).glob("*.png")).stat().st_size > 100


@pytest.mark.parametrize("data", ["boxes", pytest.param(BLOOD, marks=pytest.mark.slow)])
def test_boxes_are_found_by_a_script_of_at_most_80_lines(
    data: str | Path, folder: Path, tmp_path: Path
) -> None:
    if data == BLOOD and not BLOOD.is_dir():
        pytest.skip("needs ../shared/data/bccd, which is not here")
    assert len(DETECTION.splitlines()) <= 80
    place = BLOOD if data == BLOOD else write_boxes(tmp_path / "boxes")
    few = {
        "runs/r50": f"{folder}/runs/r50", "../shared/data/bccd": place, "20, 480, 4": "1, 64, 2",
        "data = load_dataset(DATA)":
            "data = {k: t.select(range(4)) for k, t in load_dataset(DATA).items()}",
    }  # fmt: skip
    printed = run_python(replaced(DETECTION, few), tmp_path)
    assert re.search(r"epoch 1: loss \d", printed)
    assert re.search(r"AP \d+\.\d %, AP50 \d+\.\d %", printed)


def test_the_recipe_of_views_is_one() -> None:
    (block,) = [block for block in blocks("yaml") if "preset" in block]
    x, x_prime, _ = find_recipes(yaml.safe_load(block))
    assert (x.flip, x.scale, x_prime.solarize) == (0, (0.3, 1.0), 0)
    assert x == replace(PRESETS["authors"][0], flip=0, scale=(0.3, 1.0))


@pytest.mark.parametrize(("name", "machines"), [("8-gpus", 1), ("4x8-gpus", 4), ("fsdp", 1)])
def test_accelerate_takes_its_configuration(name: str, machines: int) -> None:
    assert f"--config_file scripts/{name}.yaml" in DOCUMENTS["scripts/README.md"]
    config: Any = load_config_from_file(str(ROOT / "scripts" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert config.mixed_precision == "bf16"
