"""Settings from recipes, files and flags, and the errors for those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vicreg_hf import EvaluationArguments, PretrainingArguments
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.models.timm_models import check_architecture
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.extraction import ExtractionArguments
from vicreg_hf.settings.pretraining import default_base_lr
from vicreg_hf.settings.recipes import read_recipe, recipe_names
from vicreg_hf.views.presets import PRESETS


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


# Recipes


def test_there_are_shipped_recipes() -> None:
    assert "demo" in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses(name: str) -> None:
    args = parse_arguments(["--config", name])
    assert check_architecture(args.architecture)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_sets_what_it_says(name: str) -> None:
    args = parse_arguments(["--config", name])
    for setting, value in read_recipe(name, PretrainingArguments, "scripts/pretrain.py").items():
        actual = getattr(args, setting)
        assert type(actual)(value) == actual  # YAML reads 2e-3 as a string


@pytest.mark.parametrize("flags", [["--config", "demo"], ["--config=demo"], []])
def test_the_demo_recipe_comes_by_name_and_without_any_flag(flags: list[str]) -> None:
    assert parse_arguments(flags) == PretrainingArguments.from_recipe("demo")


@pytest.mark.parametrize("name", ["imagenet100-r18", "imagenette-r18", "small-data"])
def test_a_recipe_for_data_of_ones_own_does_not_take_the_demo(name: str) -> None:
    with pytest.raises(ValueError, match=r"^dataset_name must be given"):
        open_dataset(parse_arguments(["--config", name]).dataset_name)


@pytest.mark.parametrize("flag", ["--dataset_name", "--dataset-name"])
def test_other_data_come_without_the_demo_recipe(flag: str) -> None:
    args = parse_arguments([flag, "org/images"])
    assert args == PretrainingArguments(dataset_name="org/images")


@pytest.mark.parametrize(
    "flags",
    [
        ["--config", "demo", "--batch_size", "64"],
        ["--batch_size", "64", "--config", "demo"],
        ["--batch_size=64"],
    ],
)
def test_flags_override_the_recipe_wherever_they_stand(flags: list[str]) -> None:
    args = parse_arguments(flags)
    assert args.batch_size == 64
    assert args.architecture == "test_resnet"


def test_overrides_in_python_are_as_flags() -> None:
    args = PretrainingArguments.from_recipe("demo", batch_size=64, model_args={"img_size": 32})
    assert (args.batch_size, args.model_args) == (64, {"img_size": 32})


# YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_lr: 1e-4", {"base_lr": 1e-4}),  # YAML 1.1 reads it as a string
        ("base_lr: 0.0001", {"base_lr": 1e-4}),
        ("batch_size: 512", {"batch_size": 512}),
        ("pretrained: true", {"pretrained": True}),
        ("pretrained: no", {"pretrained": False}),
        ("image_size: null", {"image_size": None}),
        ("expander_dims: 512", {"expander_dims": "512"}),
        ("model_args: {img_size: 32, depth: 4}", {"model_args": {"img_size": 32, "depth": 4}}),
        ("model_args: '{\"img_size\": 32}'", {"model_args": {"img_size": 32}}),
        ("output_dir: a folder = here", {"output_dir": "a folder = here"}),
        ("output_dir: --odd", {"output_dir": "--odd"}),
    ],
)  # fmt: skip
def test_yaml_values_take_the_type_of_their_setting(
    text: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    args = parse_arguments(["--config", yaml_file(tmp_path, text)])
    for name, value in expected.items():
        actual = getattr(args, name)
        assert actual == value
        assert type(actual) is type(value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model_args": {"img_size": 32, "global_pool": "avg"}, "architecture": "test_vit"},
        {"base_lr": 1e-7, "weight_decay": 1e-300, "warmup_epochs": 0.5, "max_steps": 3},
        {"dataset_name": "null", "label_column": "yes", "image_column": "1e3", "output_dir": "1.0"},
        {"dataset_name": "a: b # c", "output_dir": "runs/ü\t'\""},
        {"pretrained": True, "augmentation": "paper", "resume": "required", "knn_steps": 7},
    ],
)
def test_config_yaml_gives_the_same_settings_again(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    args = PretrainingArguments(**settings)
    assert parse_arguments(["--config", yaml_file(tmp_path, args.to_yaml())]) == args


# What is filled in


@pytest.mark.parametrize(
    ("optimizer", "batch_size"), [("lars", 128), ("lars", 2048), ("adamw", 64)]
)
def test_base_lr_is_filled_in_for_the_optimiser_and_batch(optimizer: str, batch_size: int) -> None:
    args = PretrainingArguments(optimizer=optimizer, batch_size=batch_size)
    assert args.base_lr == default_base_lr(optimizer, batch_size)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [("demo", "runs/demo"), ("org/images", "runs/images"), ("/data/photos/", "runs/photos")],
)
def test_output_dir_is_named_after_the_data(dataset: str, expected: str) -> None:
    assert PretrainingArguments(dataset_name=dataset).output_dir == expected


def test_method_defaults_are_the_authors() -> None:
    args = PretrainingArguments()
    assert (args.sim_coeff, args.std_coeff, args.cov_coeff) == (25.0, 25.0, 1.0)
    assert args.expander_widths == [8192, 8192, 8192]
    assert (args.optimizer, args.weight_decay) == ("lars", 1e-6)


@pytest.mark.parametrize(("dims", "expected"), [("16", [16]), ("16-8", [16, 8])])
def test_expander_widths_are_read(dims: str, expected: list[int]) -> None:
    assert PretrainingArguments(expander_dims=dims).expander_widths == expected


@pytest.mark.parametrize("given", [[16, 8], (16, 8), "16-8"])
def test_widths_may_be_a_list(given: Any, tmp_path: Path) -> None:
    args = PretrainingArguments(expander_dims=given, weights="separate", prime_expander_dims=given)
    assert (args.expander_dims, args.prime_expander_dims) == ("16-8", "16-8")
    assert PretrainingArguments.from_recipe("demo", expander_dims=given).expander_dims == "16-8"
    path = yaml_file(tmp_path, f"expander_dims: {given if isinstance(given, str) else [16, 8]}")
    assert parse_arguments(["--config", path]).expander_dims == "16-8"


@pytest.mark.parametrize("given", [[], [16, 0], [16, 8.0], ["a"], None])
def test_widths_that_cannot_be_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^expander_dims must be positive widths, .*, got "):
        PretrainingArguments(expander_dims=given)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_views_is_an_augmentation(preset: str) -> None:
    assert parse_arguments(["--augmentation", preset]).augmentation == preset


# Errors


POSITIVE = [
    "batch_size", "num_train_epochs", "max_steps", "image_size", "logging_steps", "save_steps",
    "knn_steps", "lars_eta",
]  # fmt: skip
NOT_NEGATIVE = [
    "base_lr", "weight_decay", "warmup_epochs", "num_workers", "seed", "sim_coeff", "std_coeff",
    "cov_coeff",
]  # fmt: skip


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("name", POSITIVE)
def test_settings_that_must_be_positive_are_refused_otherwise(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        parse_arguments([f"--{name}={value}"])


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_settings_that_may_be_zero_are_refused_below(name: str) -> None:
    assert getattr(parse_arguments([f"--{name}=0"]), name) == 0
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        parse_arguments([f"--{name}=-1"])


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "name", ["base_lr", "num_train_epochs", "sim_coeff", "weight_decay", "lars_eta"]
)
def test_settings_that_are_not_finite_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        parse_arguments([f"--{name}={value}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--augmentation=strong", "augmentation must be one of authors, .*, got 'strong'"),
        ("--variance_reduction=max", "variance_reduction must be mean or sum, got 'max'"),
        ("--resume=maybe", "resume must be auto, never or required, got 'maybe'"),
        ("--model_args={img_size: 32}", "model_args must be a JSON object, got '{img_size: 32}'"),
        ("--model_args=[1, 2]", "model_args must be a JSON object"),
        ("--model_args=3", "model_args must be a JSON object"),
        ("--expander_dims=512,512", "joined by '-', as 8192-8192-8192, got '512,512'"),
        ("--expander_dims=512-0", "expander_dims must be positive"),
        ("--expander_dims=", "expander_dims must be positive"),
        ("--config=nonsense", r"a recipe \(.*demo.*\) or a YAML file, got 'nonsense'"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_with_the_rule(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([flag])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "batchsize"),
        ("batch_size: 3\nlearning_rate: 1\nepochs: 2", "epochs, learning_rate"),
        ("batch_size: 0", "batch_size must be positive, got 0"),
        ("- batch_size", "must map settings to values"),
        ("", "must map settings to values"),
        ("a: b: c", "must be valid YAML"),
        ("1: 2", "config must hold settings"),
        ("1: 2\nepochs: 3", "config must hold settings"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_the_rule(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", yaml_file(tmp_path, text)])


@pytest.mark.parametrize(
    "words", [["--batch", "5"], ["--conf", "demo"], ["--nonsense", "5"], ["--batch_size", "many"]]
)
def test_flags_that_do_not_exist_are_refused_and_not_completed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(words)
    assert words[0] in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("config", *PretrainingArguments.__annotations__))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"batchsize": 8}, r"^--batchsize is no setting, --batch_size is one"),
        ({"batch_size": "x"}, r"invalid int value: 'x'"),
    ],
)
def test_in_python_what_cannot_be_is_an_error_and_ends_nothing(
    overrides: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=said):
        PretrainingArguments.from_recipe("demo", **overrides)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"batch_size": "32"}, "batch_size must be a whole number, got '32'."),
        ({"batch_size": 32.0}, "batch_size must be a whole number, got 32.0."),
        ({"batch_size": True}, "batch_size must be a whole number, got True."),
        ({"max_steps": "9"}, "max_steps must be a whole number or None, got '9'."),
        ({"weight_decay": "1e-4"}, "weight_decay must be a number, got '1e-4'."),
        ({"base_lr": [0.1]}, r"base_lr must be a number or None, got \[0.1\]."),
        ({"pretrained": "no"}, "pretrained must be True or False, got 'no'."),
        ({"compile": 1}, "compile must be True or False or None, got 1."),
    ],
)
def test_values_of_another_kind_are_refused(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        PretrainingArguments(**setting)


def test_numbers_of_numpy_and_paths_are_taken() -> None:
    given: Any = {
        "batch_size": np.int64(64), "base_lr": np.float32(0.25), "pretrained": np.bool(False),
        "output_dir": Path("runs") / "a", "num_train_epochs": 3,
    }  # fmt: skip
    args = PretrainingArguments(**given)
    assert yaml.safe_load(args.to_yaml())["base_lr"] == 0.25
    assert args.output_dir == str(Path("runs") / "a")
    assert {type(getattr(args, name)) for name in given} == {int, float, bool, str}
    extraction: Any = {"batch_size": "8"}
    with pytest.raises(ValueError, match="batch_size must be a whole number, got '8'"):
        ExtractionArguments("m", "d", "o", **extraction)
    with pytest.raises(ValueError, match="batch_size must be a whole number, got '8'"):
        EvaluationArguments("m", "d", **extraction)
