"""Publishing over real HTTP: which files and cards a repository has afterwards, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from families import same_state, trained
from hub import Hub
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.hub.api import push_files
from vicreg_hf.hub.card import model_card, write_card
from vicreg_hf.hub.export import ExportError
from vicreg_hf.hub.source import find_encoder
from vicreg_hf.publishing.publish import export_encoders, export_source, publish

BY_HAND = b"---\nlicense: mit\n---\nMine."


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a run of two separate branches leaves."""
    output_dir = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = VICRegConfig(architecture="test_vit", expander_dims=[8], weights="separate")
    model = VICRegModel(config)
    first, second = output_dir / "encoder", output_dir / "encoder_prime"
    assert export_encoders(model, first, second, column=None) == second
    for place in (first, second):
        write_card(place / "README.md", model_card(model))
    (first / "pictures").mkdir()
    (first / "pictures" / "retrievals.png").write_bytes(b"\x89PNG")
    (first / "notes.txt").write_text("nobody else's business")
    return output_dir


def test_both_encoders_are_pushed_as_they_were_written(output_dir: Path, hub: Hub) -> None:
    address = publish(output_dir, "org/both", private=True)
    repository, second = (hub.repositories[f"models/org/both{end}"] for end in ("", "-prime"))
    assert address == f"{hub.endpoint}/org/both/commit/{repository.sha(1)}"
    encoder = {"README.md", "config.json", "model.safetensors"}
    assert repository.files().keys() == encoder  # without the picture of photographs
    assert second.files().keys() == encoder
    assert repository.private
    assert second.private
    for files, place in ((repository.files(), "encoder"), (second.files(), "encoder_prime")):
        written = (output_dir / place / "model.safetensors").read_bytes()
        assert files["model.safetensors"] == written


def test_expander_onnx_licence_and_branch_are_pushed_on_request(output_dir: Path, hub: Hub) -> None:
    publish(
        output_dir, "org/more", include_expander=True, onnx=True, license="cc-by-4.0",
        revision="v2", publish_images=True,
    )  # fmt: skip
    repository = hub.repositories["models/org/more"]
    assert repository.files() == {}
    files = repository.files("v2")
    training = {"expander.safetensors", "prime.safetensors", "vicreg.safetensors.index.json"}
    assert files.keys() >= training | {"onnx/model.onnx", "pictures/retrievals.png"}
    card: Any = ModelCard(files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert "under: cc-by-4.0." in card.text
    assert "under: mit" not in card.text
    assert "org/name" not in card.text
    onnx = files["onnx/model.onnx"]
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    model = VICRegModel.from_pretrained(output_dir / "encoder")
    for batch in (1, 5):
        x = torch.randn(batch, 3, 160, 160)
        (features,) = session.run(None, {"pixel_values": x.numpy()})
        with torch.no_grad():
            expected = model.encoder(x)
        torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-3, atol=1e-4)
    # a later push deletes what this one left, and nothing else
    push_files({"theirs.txt": b"-"}, "org/more", commit_message="-", revision="v2")
    publish(output_dir, "org/more", revision="v2")
    assert "expander.safetensors" not in repository.files("v2")
    assert "theirs.txt" in repository.files("v2")
    assert "pictures/retrievals.png" not in repository.files("v2")
    assert len(repository.commits) == 4


def test_a_card_edited_by_hand_is_kept_or_given_the_licence(hub: Hub, tmp_path: Path) -> None:
    HfApi().create_repo("org/edited")
    push_files({"README.md": BY_HAND}, "org/edited", commit_message="-")
    trained().push_to_hub("org/edited", include_expander=True)
    files = hub.repositories["models/org/edited"].files()
    assert files["README.md"] == BY_HAND
    assert "expander.safetensors" in files
    trained().save_pretrained(tmp_path)
    publish(tmp_path, "org/edited", license="cc-by-4.0")
    card: Any = ModelCard(hub.repositories["models/org/edited"].files()["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.text.strip() == "Mine."


def test_a_training_checkpoint_is_exported_and_pushed(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    PreTrainedModel.save_pretrained(model, tmp_path)
    publish(tmp_path, "org/checkpoint")
    files = hub.repositories["models/org/checkpoint"].files()
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    (tmp_path / "pushed").write_bytes(files["model.safetensors"])
    expected, pushed = model.encoder.state_dict(), load_file(tmp_path / "pushed")
    assert all(torch.equal(pushed[name], expected[name]) for name in expected)


def test_an_encoder_that_does_not_load_leaves_no_repository(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    next(model.encoder.parameters()).data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="finite features"):
        publish(tmp_path, "org/broken")
    assert "models/org/broken" not in hub.repositories


def test_a_directory_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repo_id must be org/name"):
        publish(tmp_path, "a/b/c")
    with pytest.raises(ValueError, match="must be the output_dir of a run"):
        publish(tmp_path, "org/name")
    model = trained()
    model.save_pretrained(tmp_path, include_expander=False)
    assert find_encoder(tmp_path) == tmp_path
    assert same_state(VICRegModel.from_pretrained(tmp_path).encoder, model.encoder)
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


def test_a_run_is_exported_without_a_push(output_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = export_source(output_dir, out)
    assert written == [out, out / "encoder_prime"]
    for name in ("README.md", "model.safetensors", "pictures/retrievals.png"):
        assert (out / name).read_bytes() == (output_dir / "encoder" / name).read_bytes()
    assert not (out / "notes.txt").exists()
    assert same_state(VICRegModel.from_pretrained(out).encoder,
                      VICRegModel.from_pretrained(output_dir / "encoder").encoder)  # fmt: skip
    checkpoint = tmp_path / "checkpoint"
    PreTrainedModel.save_pretrained(trained(), checkpoint)
    with pytest.raises(ValueError, match="directory must be another than the checkpoint's own"):
        export_source(checkpoint, checkpoint)
    assert export_source(checkpoint, tmp_path / "own", include_expander=True) == [tmp_path / "own"]
    assert same_state(VICRegModel.from_pretrained(tmp_path / "own"), trained())
    with pytest.raises(ValueError, match=r"^include_expander needs an expander"):
        export_source(out, tmp_path / "none", include_expander=True)
    assert not (tmp_path / "none").exists()
