"""The classifier that is kept, and encoders that are compared with others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import Dataset
from measuring import NAMES, arguments, labels_of, measure, strict, write_encoder
from reports import Page
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vicreg_hf.evaluation.classifier import check_savable
from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.features.encoders import timm_encoder
from vicreg_hf.publishing.publish import publish

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")


def test_a_classifier_that_is_kept_is_the_one_that_was_measured(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "new" / "kept"
    for epochs in (2, 3):  # the second replaces the first
        found = measure(
            encoder, data, tmp_path, "finetune", save_classifier=str(kept), epochs=epochs
        )
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "model.safetensors"]
    model: Any = AutoModelForImageClassification.from_pretrained(kept)
    assert list(model.config.id2label.values()) == NAMES
    processor: Any = AutoImageProcessor.from_pretrained(kept)
    table: Any = Dataset.from_parquet(str(data / "test.parquet"))
    pixels = torch.cat([processor(i, return_tensors="pt")["pixel_values"] for i in table["image"]])
    bare: Any = timm.create_model(f"local-dir:{kept}", pretrained=True)
    with torch.no_grad():
        logits = model.eval()(pixels).logits
        torch.testing.assert_close(bare.eval()(pixels), logits)
    right = (logits.argmax(1).numpy() == labels_of(data, "test")).mean()
    accuracy = found["fine-tuning top-1 accuracy"]["value"]
    assert right == pytest.approx(accuracy, abs=1.01 / 120)
    with pytest.raises(ValueError, match="holds a classifier, which would be lost; hf upload a/b "):
        publish(kept, "a/b")


@pytest.mark.parametrize(
    ("protocols", "place", "sentence"),
    [
        ("knn", "kept", "one of finetune, finetune-1 and finetune-10, got"),
        ("finetune,finetune-1", "kept", "one of finetune, finetune-1 and finetune-10, got"),
        ("finetune", "full", "holds other files; choose another"),
        ("finetune", "full/mine.txt", "save_classifier must be a directory that can be written"),
    ],
)
def test_a_classifier_that_cannot_be_kept_is_refused_at_once(
    protocols: str, place: str, sentence: str, encoder: Path, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=sentence):
        measure(encoder, few, tmp_path, protocols, save_classifier=str(tmp_path / place))
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_only_classifiers_of_one_linear_layer_are_kept(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    other = timm_encoder(timm.create_model(name, num_classes=0, depth=1), name, {"depth": 1})
    with pytest.raises(ValueError, match="whose classifier is one linear layer"):
        check_savable(other, NAMES, tmp_path / "kept")
    vit = timm_encoder(timm.create_model("test_vit", num_classes=0), "test_vit")
    check_savable(vit, NAMES, tmp_path / "kept")


def test_encoders_are_compared_on_the_same_images(few: Path, tmp_path: Path) -> None:
    models = [write_encoder(tmp_path / "a"), write_encoder(tmp_path / "b", seed=5, crop_pct=0.8)]
    args = arguments(",".join(map(str, models)), few, tmp_path, "knn,collapse", knn_k="5")
    said: list[str] = []
    results = evaluate(args, say=said.append)
    assert strict(tmp_path / "out" / "results.json") == results
    for model, found in zip(models, results["models"], strict=True):
        alone = arguments(model, few, tmp_path, "knn,collapse", knn_k="5")
        alone = replace(alone, output_dir=str(tmp_path / model.name / "out"))
        expected = evaluate(alone, say=said.append)
        assert found == {k: v for k, v in expected.items() if k != "verdict"}
        assert found["baselines"].keys() == {"raw pixels", "untrained"}
    page = Page(tmp_path / "out" / "report.html")
    assert page.tables["measurements"][0] == ["Measure", "a", "b", "Test images", "Settings"]
    assert results["verdict"] in said
    (difference,) = results["differences"]
    assert {difference["better"], difference["worse"]} == {"a, 5-NN", "b, 5-NN"}


@pytest.mark.parametrize("wanted", [None, False, True])
def test_an_untrained_encoder_and_pixels_are_measured_as_asked(
    wanted: bool | None, encoder: Path, few: Path, tmp_path: Path
) -> None:
    args = arguments(encoder, few, tmp_path, knn_k="5", baselines=wanted, update_card=False)
    found = evaluate(args, say=lambda _: None)
    names = set() if wanted is False else {"raw pixels", "untrained"}
    assert found["baselines"].keys() == names
    if names:
        assert "; raw pixels " in found["verdict"]
