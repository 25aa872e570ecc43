"""Settings of pretraining from recipes, files, flags and Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from vicreg_hf import PretrainingArguments
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.learning_rate import default_base_lr, learning_rate


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_demo_recipe_comes_by_name_and_without_any_flag_and_flags_override_it() -> None:
    for flags in (["--config", "demo"], ["--config=demo"], []):
        assert parse_arguments(flags) == PretrainingArguments.from_recipe("demo")
        for words in ([*flags, "--batch_size", "64"], ["--batch_size=64", *flags]):
            args = parse_arguments(words)
            assert (args.batch_size, args.architecture) == (64, "test_resnet")
    for flag in ("--dataset_name", "--dataset-name"):  # other data come without it
        args = parse_arguments([flag, "org/images"])
        assert args == PretrainingArguments(dataset_name="org/images")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_lr: 1e-4", {"base_lr": 1e-4}),  # YAML 1.1 reads it as a string
        ("batch_size: 512", {"batch_size": 512}),
        ("pretrained: no", {"pretrained": False}),
        ("image_size: null", {"image_size": None}),
        ("expander_dims: 512", {"expander_dims": "512"}),
        ("expander_dims: [16, 8]", {"expander_dims": "16-8"}),
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
        {"weights": "separate", "augmentation": {"flip": 0}, "prime_expander_dims": "16-8192"},
    ],
)
def test_config_yaml_gives_the_same_settings_again(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    args = PretrainingArguments(**settings)
    assert parse_arguments(["--config", yaml_file(tmp_path, args.to_yaml())]) == args


def test_defaults_are_the_authors_and_output_dir_is_named_after_the_data() -> None:
    args = PretrainingArguments()
    assert (args.sim_coeff, args.std_coeff, args.cov_coeff) == (25.0, 25.0, 1.0)
    assert args.expander_widths == [8192, 8192, 8192]
    assert (args.optimizer, args.weight_decay, args.output_dir) == ("lars", 1e-6, "runs/demo")
    for name, place in (("org/images", "runs/images"), ("/data/photos/", "runs/photos")):
        assert PretrainingArguments(dataset_name=name).output_dir == place


@pytest.mark.parametrize("widths", [[16, 8], (16, 8), "16-8"])
def test_widths_may_be_a_list(widths: Any) -> None:
    given = {"expander_dims": widths, "prime_expander_dims": widths, "weights": "separate"}
    args = PretrainingArguments(**given)
    assert (args.expander_dims, args.prime_expander_dims) == ("16-8", "16-8")
    assert args.prime_expander_widths == [16, 8]
    assert PretrainingArguments.from_recipe("demo", expander_dims=widths).expander_dims == "16-8"


@pytest.mark.parametrize("widths", [[], [16, 8.0], ["a"], None, "512,512", "512-0"])
def test_widths_that_cannot_be_are_refused(widths: Any) -> None:
    with pytest.raises(ValueError, match=r"^expander_dims must be positive widths, .*, got "):
        PretrainingArguments(expander_dims=widths)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--augmentation=strong", "augmentation must be one of authors, .*, got 'strong'"),
        ("--augmentation={", "augmentation must be a JSON object, got '{'"),
        ("--variance_reduction=max", "variance_reduction must be mean or sum, got 'max'"),
        ("--num_global_views=1", "num_global_views must be at least 2, got 1"),
        ("--model_args=[1,2]", "model_args must be a JSON object"),
        ("--push_to_hub", "push_to_hub needs hub_model_id, org/name, and got none"),
        ("--config=nonsense", r"a recipe \(.*demo.*\) or a YAML file, got 'nonsense'"),
        ("--prime_modality=text", "prime_architecture must name the encoder of text, got none"),
        ("--prime_modality=smell", "prime_modality must be one of image, text"),
        ("--prime_column=caption", "prime_modality must say what prime_column holds"),
        ("--weights=own", "weights must be shared or separate"),
        ("--weights=separate --prime_expander_dims=8-4", "must end in the same width"),
        ("--prime_tokenizer=bert", "prime_tokenizer must be left out with no second branch"),
        ("--prime_modality=text --prime_architecture=bert --prime_image_size=32",
         "prime_image_size must be left out with text"),
        ("--prime_modality=embedding --prime_architecture=resnet18",
         "prime_architecture must be left out with embedding"),
        ("--prime_modality=embedding --streaming", "streaming must be false for a second branch"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_with_the_rule(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(flags.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 3\nlearning_rate: 1\nepochs: 2", "epochs, learning_rate"),
        ("batch_size: 0", "batch_size must be positive, got 0"),
        ("- batch_size", "must map settings to values"),
        ("", "must map settings to values"),
        ("a: b: c", "must be valid YAML"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_the_rule(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", yaml_file(tmp_path, text)])


def test_in_python_what_cannot_be_is_an_error_and_ends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    misspelt: Any = {"batchsize": 8}
    with pytest.raises(ValueError, match=r"^--batchsize is no setting, --batch_size is one"):
        PretrainingArguments.from_recipe("demo", **misspelt)
    with pytest.raises(ValueError, match=r"invalid int value: 'x'"):
        PretrainingArguments.from_recipe("demo", batch_size="x")
    assert capsys.readouterr() == ("", "")


# --- the learning rate


@pytest.mark.parametrize(
    ("step", "warmup_steps", "total_steps", "expected"),
    [
        (0, 10, 110, 0.0), (5, 10, 110, 1.0), (10, 10, 110, 2.0),  # warm-up is over
        (60, 10, 110, 1.001),  # half way down to 0.002
        (109, 10, 110, 0.002 + 1.998 * 0.5 * (1 + math.cos(math.pi * 0.99))),  # the last step
        (110, 10, 110, 0.002),
        (0, 0, 10, 2.0), (0, 4, 4, 0.0), (3, 4, 4, 1.5),  # without warm-up, and with nothing else
    ],
)  # fmt: skip
def test_learning_rate_matches_values_worked_by_hand(
    step: int, warmup_steps: int, total_steps: int, expected: float
) -> None:
    lr = learning_rate(step, peak=2.0, warmup_steps=warmup_steps, total_steps=total_steps)
    assert lr == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "expected"),
    [
        ("lars", 128, 0.8), ("lars", 256, 0.5), ("lars", 512, 0.4), ("lars", 1024, 0.3),
        ("lars", 4096, 0.3), ("adamw", 4096, 1e-3),
    ],
)  # fmt: skip
def test_default_base_lr_is_the_papers_by_batch_size(
    optimizer: str, batch_size: int, expected: float
) -> None:
    assert default_base_lr(optimizer, batch_size) == expected
    args = PretrainingArguments(optimizer=optimizer, batch_size=batch_size)
    assert args.base_lr == expected


@pytest.mark.parametrize(
    ("given", "read"),
    [("none", []), (None, []), ("TensorBoard, wandb,tensorboard", ["tensorboard", "wandb"]),
     (["mlflow", "comet_ml"], ["mlflow", "comet_ml"])],
)  # fmt: skip
def test_trackers_are_listed_in_any_way(given: Any, read: list[str]) -> None:
    args = PretrainingArguments(report_to=given)
    assert args.trackers == read
    assert args.report_to == (",".join(read) or "none")


@pytest.mark.parametrize("given", ["tensorbord", "wandb,none", 3, "all"])
def test_unknown_trackers_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"report_to must be none, or some of aim, .*wandb, sep"):
        PretrainingArguments(report_to=given)
