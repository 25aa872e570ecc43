"""Settings of an evaluation: from recipes, files and flags, and those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vicreg_hf.settings.command_line import parse_evaluation_arguments
from vicreg_hf.settings.evaluation import EvaluationArguments
from vicreg_hf.settings.finetuning import LINEAR, ONE_PERCENT, TEN_PERCENT, FinetuneSettings


def given(**settings: Any) -> EvaluationArguments:
    return EvaluationArguments("org/model", "org/data", **settings)


def parse(*words: str) -> EvaluationArguments:
    return parse_evaluation_arguments(["--model=org/model", "--dataset_name=org/data", *words])


@pytest.mark.parametrize("name", ["paper", "semi-supervised-authors"])
def test_flags_override_a_recipe_wherever_they_stand(name: str) -> None:
    flags = ["--epochs=7", "--protocols", "finetune-1,knn"]
    for words in ([f"--config={name}", *flags], [*flags, "--config", name]):
        args = parse(*words)
        assert args.epochs == args.training("finetune-1")[0].epochs == 7
        assert args.protocol_names == ["finetune-1", "knn"]


def test_the_recipes_are_the_authors_settings_and_defaults_the_papers() -> None:
    assert parse("--config=linear-authors").training("linear-sgd") == (LINEAR, 1.0)
    assert LINEAR.frozen
    tuned = parse("--config=semi-supervised-authors")
    assert tuned.training("finetune-1") == (ONE_PERCENT, 0.01)
    assert tuned.training("finetune-10") == (TEN_PERCENT, 0.1)
    args = parse()
    assert args == given()
    assert args.protocol_names == ["knn", "linear"]
    assert args.numbers("knn_k") == [20, 200]
    assert args.temperature == 0.07


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: org/model\ndataset_name: org/data\nknn_k: 3,7\nbf16: true\n")
    args = parse_evaluation_arguments(["--config", str(path)])
    assert args.numbers("knn_k") == [3, 7]
    assert args.bf16 is True
    path.write_text("neighbours: 3\n")
    with pytest.raises(ValueError, match=r"settings of vicreg-hf evaluate, got neighbours in"):
        parse("--config", str(path))
    with pytest.raises(ValueError, match=r"config must be a recipe \(linear-authors, paper, seg"):
        parse("--config=absent")


def test_results_go_by_default_where_their_names_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "encoder").mkdir(parents=True)
    for model, data, expected in (
        ("org/model", "org/data", "model-on-data"),
        ("runs/first", "demo", "first-on-demo"),
        ("runs/first/encoder", "demo", "first-on-demo"),
    ):
        assert EvaluationArguments(model, data).output_dir == f"evaluations/{expected}"
    monkeypatch.chdir(tmp_path / "runs" / "first")
    assert EvaluationArguments(".", "demo").output_dir == "evaluations/first-on-demo"


def test_lists_are_read_once_each_and_in_order() -> None:
    args = given(protocols=" retrieval, knn,,knn", knn_k="20, 5,20")
    assert args.protocol_names == ["retrieval", "knn"]
    assert args.numbers("knn_k") == [5, 20]


def test_settings_of_training_go_where_they_belong() -> None:
    args = given(protocols="finetune", lr_head=0.3, lr_backbone=0.2, seed=4, label_fraction=0.25)
    tuned, fraction = args.training("finetune")
    assert (tuned.lr_head, tuned.lr_backbone, tuned.seed, fraction) == (0.3, 0.2, 4, 0.25)
    linear, fraction = args.training("linear-sgd")
    assert (linear.lr_head, linear.frozen, fraction) == (0.3, True, 1.0)
    assert args.training("finetune-1")[1] == 0.01


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"protocols": "knn,probe"}, "protocols must be of knn, linear, .* got probe"),
        ({"protocols": " ,"}, "protocols must be of .* got none"),
        ({"knn_k": "20,x"}, "knn_k must be positive whole numbers joined by commas, got '20,x'"),
        ({"retrieval_k": "0"}, "retrieval_k must be positive whole numbers"),
        ({"seed": 2**32}, r"seed must be between 0 and 2\*\*32 - 1, got 4294967296"),
        ({"protocols": "finetune-10", "label_fraction": 0.5}, "settings of the protocol finetune"),
        ({"label_list": "x"}, "settings of the protocol finetune, got protocols=knn,linear"),
        ({"protocols": "finetune", "label_fraction": 0.5, "label_list": "x"}, "exclude each other"),
        (
            {"protocols": "knn", "labels_per_class": 10},
            "setting of the protocol linear, got protocols=knn",
        ),
    ],
)
def test_settings_that_cannot_be_are_said_in_a_sentence(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        given(**settings)
    assert "\n" not in str(refused.value)


# --- how a classifier is trained


def test_settings_are_the_authors() -> None:
    common = {"batch_size": 256, "scale": (0.08, 1.0), "flip": 0.5}
    linear = {"epochs": 100, "lr_head": 0.02, "lr_backbone": 0.0, "weight_decay": 1e-6}
    few = {"epochs": 20, "weight_decay": 0.0}
    for settings, expected in (
        (LINEAR, linear),
        (ONE_PERCENT, few | {"lr_backbone": 0.03, "lr_head": 0.08}),
        (TEN_PERCENT, few | {"lr_backbone": 0.01, "lr_head": 0.1}),
    ):
        for name, value in (common | expected).items():
            assert getattr(settings, name) == value


def test_a_setting_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be two positive numbers"):
        FinetuneSettings(scale=(0.5, 0.1))
    with pytest.raises(ValueError, match="flip must be a number between 0 and 1, got"):
        FinetuneSettings(flip=2.0)
