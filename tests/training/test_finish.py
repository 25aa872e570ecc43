"""The end of a run: the card, and pushing to a Hub that may refuse or break off."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hub import DROP, READER, WRITER, Hub
from huggingface_hub import ModelCard
from workflow import SMALL, metrics, train, write_images

from vicreg_hf import PretrainingArguments, pretrain
from vicreg_hf.hub import api, export
from vicreg_hf.hub.api import HubError
from vicreg_hf.hub.card import PICTURES
from vicreg_hf.publishing.publish import publish
from vicreg_hf.settings.command_line import parse_arguments


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "jane_does_images")


def pushed(images: Path, output_dir: Path, repo_id: str, *more: str) -> PretrainingArguments:
    return parse_arguments([
        *SMALL, f"--dataset_name={images}", f"--output_dir={output_dir}", "--push_to_hub=true",
        f"--hub_model_id={repo_id}", "--hub_private=true", "--max_steps=3", "--save_steps=2", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def finished(hub: Hub, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run that was pushed to org/name, verified before and after training."""
    directory, verified = tmp_path_factory.mktemp("runs") / "run", []
    verify = export.verify_export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "verify_export", lambda *words: verified.append(verify(*words)))
        pretrain(pushed(images, directory, "org/name"))
    assert len(verified) == 2
    assert "models/org/name" in hub.repositories
    return directory


def test_the_card_says_what_the_run_was_and_nothing_of_the_machine(
    finished: Path, images: Path
) -> None:
    text = (finished / "encoder" / "README.md").read_text()
    card: Any = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license is None  # nobody has chosen one
    (result,) = card.data.eval_results
    assert result.metric_name == "20-NN top-1 accuracy"
    last = metrics(finished)[-1]
    assert result.metric_value == pytest.approx(100 * last["knn"], abs=0.01)
    assert f"{100 * last['knn']:.1f} %" in text
    assert "the local data set `jane_does_images`, 64 images" in text
    assert '.convert("RGB")' in text
    assert "| steps | 3 of 16 images, two views each |" in text
    assert "| views seen | 96 |" in text
    assert "More Information Needed" not in text
    for private in (str(finished), str(images), str(Path.home()), "/tmp"):
        assert private not in text
    for picture in ("loss_terms", "singular_values", "retrievals"):
        assert f"pictures/{picture}.png" in text
        content = (finished / "encoder" / "pictures" / f"{picture}.png").read_bytes()
        assert content.startswith(b"\x89PNG")


def test_the_files_that_were_verified_are_pushed(finished: Path, hub: Hub) -> None:
    repository = hub.repositories["models/org/name"]
    assert repository.private
    assert len(repository.commits) == 2
    files = repository.files()
    assert files.keys() == {
        "README.md", "config.json", "model.safetensors", "pictures/loss_terms.png",
        "pictures/singular_values.png",
    }  # fmt: skip
    for name in files.keys() - {"README.md", "config.json"}:
        assert files[name] == (finished / "encoder" / name).read_bytes()
    assert "transformers_weights" not in json.loads(files["config.json"])["vicreg"]
    card = files["README.md"].decode()
    assert 'AutoModel.from_pretrained("org/name")' in card
    assert "hf-hub:org/name" in card


def test_a_push_cut_off_midway_leaves_the_earlier_revision_and_the_command_to_retry(
    finished: Path, images: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(api, "FIRST_WAIT", 0.001)
    repository = hub.repositories["models/org/name"]
    before = dict(repository.files())
    hub.fail("POST", "^/api/models/org/name/commit/", DROP)
    with pytest.raises(HubError, match="tried 3 times") as caught:
        pretrain(pushed(images, finished, "org/name", "--resume=never", "--seed=1"))
    hub.faults.clear()
    assert repository.files() == before
    assert f"The encoder is whole in {finished / 'encoder'}" in str(caught.value)
    command = str(caught.value).split("Push it again with")[1]
    assert shlex.split(command) == [
        "vicreg-hf", "publish", str(finished), "--repo_id", "org/name", "--private",
    ]  # fmt: skip
    publish(finished, "org/name", private=True)
    assert repository.files()["model.safetensors"] != before["model.safetensors"]
    assert repository.files().keys() == before.keys()
    assert WRITER not in str(caught.value) + "".join(capsys.readouterr())


def test_a_run_ends_well_without_the_pictures_and_cards_that_cannot_be_made(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    flags = ["--max_steps=2", '--model_args={"output_stride": 8}']  # whose feature map is drawn
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with monkeypatch.context() as patch:
        patch.setattr("vicreg_hf.training.finish.model_card", fails)
        train(images, tmp_path, *flags)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    for name, warning in zip((*PICTURES, f"{tmp_path}: OSError: "), warnings, strict=True):
        assert name in warning
    encoder = tmp_path / "encoder"
    assert (encoder / "model.safetensors").is_file()
    assert not any((encoder / "pictures").iterdir())
    train(images, tmp_path, *flags)  # what was left out is made up for
    assert "pictures/" not in (encoder / "README.md").read_text()


def test_a_run_that_may_not_push_stops_before_it_trains(
    hub: Hub, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="pushing to org/other needs an access token that may write"):
        pretrain(pushed(images, tmp_path / "run", "org/other"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="hub_model_id must be org/name"):
        pushed(images, tmp_path / "run", "a/b/c")
    assert "models/org/other" not in hub.repositories


def test_a_licence_that_the_hub_does_not_know_is_refused_before_training(
    hub: Hub, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="license must be an identifier of the Hub"):
        pushed(images, tmp_path, "org/licensed", "--license=My own")
    hub.fail("POST", "^/api/validate-yaml", 400, content=b"no licence of that name")
    with pytest.raises(HubError, match=r"license 'nobodys': .*no licence of that name"):
        pretrain(pushed(images, tmp_path / "run", "org/licensed", "--license=nobodys"))
    hub.faults.clear()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
