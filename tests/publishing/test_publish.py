"""Publishing over real HTTP: the Hub's own client pushes, transformers and timm load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, photograph, pixels, same_state, trained
from hub import READER, STRANGER, Hub, online, running_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from warm import run_pretraining
from workflow import LIMIT, ROOT, SMALL, environment, run, write_images

from vicreg_hf import VICRegModel, export_encoder
from vicreg_hf.hub.api import check_repo_id, check_revision, without_tokens
from vicreg_hf.hub.export import ExportError
from vicreg_hf.publishing.loading import find_encoder
from vicreg_hf.publishing.publish import publish


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def python(code: str, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, cwd=ROOT / "tests/helpers", env=environment(**extra), capture_output=True,
        text=True, timeout=LIMIT, check=False,
    )  # fmt: skip


# Every family, pushed to a private repository and loaded where vicreg_hf cannot be imported

PUSH = """
import torch
from families import FAMILIES, trained
torch.set_num_threads(1)
for architecture in FAMILIES:
    model = trained(architecture)
    model.push_to_hub(f"org/{architecture}", private=True, include_expander=True)
    model.push_to_hub(f"org/{architecture}", revision="v1")
"""

LOAD = """
import json, sys
from pathlib import Path
sys.modules["vicreg_hf"] = None  # importing it fails
import timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline,
)
torch.set_num_threads(1)
root = Path(sys.argv[1])
photograph = Image.open(root / "photograph.png")
for path in sorted(root.glob("*.safetensors")):
    repo, x = f"org/{path.stem}", load_file(path)["x"]
    assert AutoConfig.from_pretrained(repo).model_type == "timm_wrapper"
    classifier = AutoModelForImageClassification.from_pretrained(repo, num_labels=10)
    logits = classifier(x, labels=torch.tensor([0, 1]))
    logits.loss.backward()
    assert logits.logits.shape == (2, 10)
    headed = timm.create_model(f"hf-hub:{repo}", pretrained=True, num_classes=7).eval()
    last = {"features_only": True, "out_indices": (-1,)}
    maps = timm.create_model(f"hf-hub:{repo}", pretrained=True, **last).eval()
    processed = AutoImageProcessor.from_pretrained(repo)(photograph)["pixel_values"]
    with torch.no_grad():
        results = {
            "transformers": AutoModel.from_pretrained(repo)(x).pooler_output,
            "revision": AutoModel.from_pretrained(repo, revision="v1")(x).pooler_output,
            "timm": timm.create_model(f"hf-hub:{repo}", pretrained=True).eval()(x),
            "timm_revision": timm.create_model(f"hf-hub:{repo}@v1", pretrained=True).eval()(x),
            "headed": headed.forward_head(headed.forward_features(x), pre_logits=True),
            "logits": headed(x),
            "processed": processed,
            "pipeline": torch.tensor(pipeline(model=repo, device="cpu")(photograph, pool=True)),
            "map": maps(x)[-1],
        }
    save_file({k: v.contiguous() for k, v in results.items()}, root / f"{path.stem}.results")
    state = classifier.timm_model.state_dict()
    (root / f"{path.stem}.json").write_text(json.dumps(sorted(state)))
"""


@pytest.fixture(scope="module")
def published(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    done = python(PUSH, **online(hub, root / "writer"))
    assert done.returncode == 0, done.stderr
    photograph().save(root / "photograph.png")
    for architecture in FAMILIES:
        save_file({"x": pixels(architecture)}, root / f"{architecture}.safetensors")
    done = python(LOAD, str(root), **online(hub, root / "reader", READER))
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_stock_loader_gives_the_features_of_a_private_repository(
    published: Path, architecture: str
) -> None:
    results = load_file(published / f"{architecture}.results")
    with torch.no_grad():
        output = trained(architecture)(pixels(architecture))
        processed = trained(architecture)(results["processed"]).pooler_output
    for name in ("transformers", "revision", "timm", "timm_revision"):
        torch.testing.assert_close(results[name], output.pooler_output)
    torch.testing.assert_close(results["pipeline"], processed)
    assert results["logits"].shape == (2, 7)
    if results["headed"].shape == output.pooler_output.shape:
        torch.testing.assert_close(results["headed"], output.pooler_output)
    assert results["map"].shape[0] == 2


FRESH = """
import sys, torch
from safetensors.torch import save_file
from vicreg_hf import VICRegModel
whole = VICRegModel.from_pretrained("org/test_resnet")
bare = VICRegModel.from_pretrained("org/test_resnet", revision="v1")
save_file({f"whole.{k}": v for k, v in whole.state_dict().items()}
          | {f"bare.{k}": v for k, v in bare.state_dict().items()}, sys.argv[1])
"""


def test_vicreg_model_comes_back_with_the_expander_where_it_was_published(
    hub: Hub, published: Path, tmp_path: Path
) -> None:
    done = python(FRESH, str(tmp_path / "state"), **online(hub, published / "ours", READER))
    assert done.returncode == 0, done.stderr
    state = load_file(tmp_path / "state")
    for name, value in trained().state_dict().items():
        assert torch.equal(state[f"whole.{name}"], value), name
        same = torch.equal(state[f"bare.{name}"], value)
        assert same or name.startswith("expander."), name
    assert not torch.equal(state["whole.expander.0.weight"], state["bare.expander.0.weight"])


def test_a_push_is_one_commit_and_leaves_nothing_stale(hub: Hub, published: Path) -> None:
    assert published.is_dir()
    repository = hub.repositories["models/org/test_resnet"]
    assert repository.private
    assert len(repository.commits) == 3  # empty, main, v1
    with_expander = {"expander.safetensors", "vicreg.safetensors.index.json"}
    expected = {"config.json", "model.safetensors", "README.md"}
    assert set(repository.files()) == expected | with_expander
    assert set(repository.files("v1")) == expected
    assert "expander" not in json.loads(repository.files("v1")["config.json"]).get("vicreg", {})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "jane_does_images")


# The card of a run


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    flags = [*SMALL, f"--dataset_name={images}", "--max_steps=3", f"--output_dir={directory}"]
    done = run_pretraining(*flags)
    assert done.returncode == 0, done.stderr
    return directory


def test_the_card_says_what_the_run_was_and_nothing_of_the_machine(
    finished: Path, images: Path
) -> None:
    text = (finished / "encoder" / "README.md").read_text()
    card: Any = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license == "mit"
    (result,) = card.data.eval_results
    assert result.metric_name == "20-NN top-1 accuracy"
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.metric_value == pytest.approx(100 * last["knn"], abs=0.01)
    assert f"{100 * last['knn']:.1f} %" in text
    assert "the local data set `jane_does_images`, 64 images" in text
    assert 'from images of mode RGB: `image.convert("RGB")`.' in text
    assert "| views seen | 96 |" in text
    assert "More Information Needed" not in text
    for private in (str(finished), str(images), str(Path.home()), "/tmp"):
        assert private not in text
    for picture in ("loss_terms", "singular_values", "retrievals"):
        assert f"pictures/{picture}.png" in text
        content = (finished / "encoder" / "pictures" / f"{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG")


def test_publish_writes_the_id_and_the_licence_into_the_card(
    finished: Path, hub: Hub, tmp_path: Path
) -> None:
    command = [sys.executable, "scripts/publish.py", str(finished), "--repo_id", "org/from-a-run"]
    flags = ["--include_expander", "--onnx", "--license=cc-by-4.0", "--revision=v2"]
    done = run([*command, *flags], **online(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["models/org/from-a-run"]
    assert f"{hub.endpoint}/org/from-a-run/commit/{repository.sha(1)}" in done.stdout
    assert repository.files() == {}
    files = repository.files("v2")
    assert files.keys() >= {"expander.safetensors", "onnx/model.onnx", "pictures/retrievals.png"}
    card: Any = ModelCard(files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert "under: cc-by-4.0." in card.text
    assert "under: mit" not in card.text
    assert "org/name" not in card.text


def test_a_hand_edited_card_is_kept_by_a_push_from_python(hub: Hub, tmp_path: Path) -> None:
    code = """
import sys
from families import trained
from huggingface_hub import HfApi
trained().push_to_hub("org/edited")
HfApi().upload_file(path_or_fileobj=b"---\\nlicense: mit\\n---\\nMine.",
                    path_in_repo="README.md", repo_id="org/edited")
trained().push_to_hub("org/edited", include_expander=True)
"""
    done = python(code, **online(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    files = hub.repositories["models/org/edited"].files()
    assert files["README.md"] == b"---\nlicense: mit\n---\nMine."
    assert "expander.safetensors" in files


def test_a_hand_edited_card_is_given_the_licence_that_is_asked_for(
    hub: Hub, tmp_path: Path
) -> None:
    trained().save_pretrained(tmp_path / "model")
    code = f"""
from huggingface_hub import HfApi
from vicreg_hf.publishing.publish import publish
HfApi().create_repo("org/licensed")
HfApi().upload_file(path_or_fileobj=b"---\\nlicense: mit\\n---\\nMine.",
                    path_in_repo="README.md", repo_id="org/licensed")
publish({str(tmp_path / "model")!r}, "org/licensed", license="cc-by-4.0")
"""
    done = python(code, **online(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    card: Any = ModelCard(hub.repositories["models/org/licensed"].files()["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.text.strip() == "Mine."


def test_what_cannot_be_exported_leaves_no_empty_repository(
    finished: Path, hub: Hub, tmp_path: Path
) -> None:
    words = [sys.executable, "scripts/publish.py", str(finished), "--repo_id", "org/too-large"]
    limited = ["bash", "-c", 'ulimit -f 1; "$@"', "-", *words]  # files of 1 KiB at most
    done = run(limited, **online(hub, tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "models/org/too-large" not in hub.repositories


# Refusals, before any work


def test_only_a_vicreg_model_is_exported(tmp_path: Path) -> None:
    other: Any = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^model must be a VICRegModel, got Linear; VICRegModel"):
        export_encoder(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_export_that_stock_loaders_would_not_follow_is_refused(tmp_path: Path) -> None:
    export_encoder(trained(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = trained("resnet10t")
    backbone: Any = model.backbone
    backbone.maxpool = nn.Identity()
    with pytest.raises(ExportError, match="same features"):
        export_encoder(model, tmp_path)
    backbone.conv1[0] = nn.Conv2d(3, 24, 5, padding=2, bias=False)
    with pytest.raises(ExportError, match="must be able to load"):
        export_encoder(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_encoder_of_nan_is_refused(tmp_path: Path) -> None:
    model = trained()
    next(model.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ExportError, match="finite features"):
        export_encoder(model, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = trained().train()
    export_encoder(model, tmp_path)
    assert model.training
    assert model.encoder.training
    assert same_state(model, trained())


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "org/name\n", "org/na me", "", "x/", "-a/b"])
def test_ids_that_cannot_be_are_refused(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repo_id must be org/name"):
        check_repo_id(repo_id)
    with pytest.raises(ValueError, match="repo_id must be org/name"):
        publish(tmp_path / "nothing", repo_id)


@pytest.mark.parametrize("revision", ["a b", "../main", "-f", "a//b", "x.lock", "v1\n", ""])
def test_revisions_that_cannot_be_are_refused(revision: str) -> None:
    with pytest.raises(ValueError, match="revision must be a branch"):
        check_revision(revision)
    assert check_revision("release/v1.0") == "release/v1.0"


def test_the_flags_of_pushing_are_checked_with_the_others(tmp_path: Path) -> None:
    for flags, sentence in {
        ("--push_to_hub=true",): "push_to_hub needs hub_model_id",
        ("--hub_model_id=a/b/c",): "hub_model_id must be org/name",
    }.items():
        done = run_pretraining(*flags, f"--output_dir={tmp_path / 'run'}")
        assert done.returncode != 0
        assert f"error: {sentence}" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_holds_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be the output_dir of a run"):
        publish(tmp_path, "org/name")
    trained().save_pretrained(tmp_path, include_expander=False)
    assert find_encoder(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="include_expander needs an expander"):
        publish(tmp_path, "org/name", include_expander=True)
    weights = load_file(tmp_path / "model.safetensors")
    first = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != first}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1: backbone.{first}"):
        publish(tmp_path, "org/name")
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="does not load"):
        publish(tmp_path, "org/name")


def test_a_run_that_was_killed_is_published_from_its_newest_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
    found = find_encoder(tmp_path)
    assert found == tmp_path / "checkpoints" / "step-3"
    whole = VICRegModel.from_pretrained(finished / "encoder")
    assert same_state(VICRegModel.from_pretrained(found), whole)


def test_nothing_that_looks_like_a_token_is_shown() -> None:
    text = f"header 'Bearer {STRANGER}' and my-own-secret"
    assert without_tokens(text, "my-own-secret") == "header 'Bearer [token]' and [token]"
