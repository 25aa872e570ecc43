"""Settings: declared with their limits, checked, read as flags, and shown by --help."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest

from vicreg_hf import EvaluationArguments, PretrainingArguments
from vicreg_hf.configuration_vicreg import MODALITIES
from vicreg_hf.data.memory import SMALL_IMAGE
from vicreg_hf.settings.base import (
    Count,
    NotNegative,
    Positive,
    PositiveShare,
    Settings,
    Share,
    WholeFromZero,
    descriptions,
    one_of,
)
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.evaluation import PROTOCOLS
from vicreg_hf.settings.extraction import ExtractionArguments
from vicreg_hf.settings.finetuning import FinetuneSettings
from vicreg_hf.settings.parser import FlagsParser, SettingsParser
from vicreg_hf.views.presets import PRESETS


@dataclass(frozen=True)
class Example(Settings):
    """A setting of every kind, of which one must be given."""

    place: str
    """Where."""
    size: Count | None = None
    """How large."""
    grow: bool = False
    """Or not."""
    rate: Positive = 1.0
    """How fast."""
    decay: NotNegative = 0.0
    """How much less."""
    seed: WholeFromZero = 0
    """Which order."""
    share: Share = 0.5
    """Which part, if any."""
    part: PositiveShare = 1
    """Which part."""
    mode: Annotated[str, one_of("one", "two", "three")] = "one"
    """How."""
    headings: ClassVar[dict[str, str]] = {"place": "location", "size": "growth"}
    usual: ClassVar[tuple[str, ...]] = ("place", "rate")


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"size": 0}, "size must be positive, got 0; leave it out for none."),
        ({"rate": math.inf}, "rate must be positive and finite, got inf."),
        ({"decay": -1}, "decay must be at least 0, got -1."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"share": 2.0}, "share must be between 0 and 1, got 2.0."),
        ({"part": 0}, "part must be above 0 and at most 1, got 0."),
        ({"mode": "four"}, "mode must be one of one, two, three, got 'four'."),
        ({"size": 32.0}, "size must be a whole number or None, got 32.0."),
        ({"size": True}, "size must be a whole number or None, got True."),
        ({"rate": "1e-4"}, "rate must be a number, got '1e-4'."),
        ({"grow": 1}, "grow must be True or False, got 1."),
    ],
)
def test_a_value_outside_its_declaration_is_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Example("here", **values)
    assert str(refused.value) == rule


def test_numbers_of_numpy_and_paths_become_pythons() -> None:
    values: Any = {"size": np.int64(64), "rate": np.float32(0.25), "grow": np.bool(False)}
    example = Example(Path("a") / "b", **values)  # pyright: ignore[reportArgumentType]
    assert (example.place, example.size, example.rate, example.grow) == ("a/b", 64, 0.25, False)
    assert [type(getattr(example, name)) for name in values] == [int, float, bool]
    assert type(Example("", decay=3).decay) is int


@pytest.mark.parametrize(
    "settings",
    [
        PretrainingArguments(), EvaluationArguments("m", "d"), ExtractionArguments("m", "d", "o"),
        FinetuneSettings(),
    ],
    ids=lambda settings: type(settings).__name__,
)  # fmt: skip
def test_settings_do_not_change_and_are_checked_when_they_are_replaced(settings: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        settings.batch_size = 8
    assert replace(settings) == settings
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        replace(settings, batch_size=0)


# --- flags


def parser() -> SettingsParser:
    made = SettingsParser(Example, description="A script.")
    made.add_argument("--list", action="store_true", help="Its own.")
    return made


def own_flags() -> FlagsParser:
    made = FlagsParser(description="A script.")
    made.add_argument("source", metavar="RUN_OR_DIR")
    made.add_argument("--repo_id", required=True)
    made.add_argument("--private", action="store_true")
    return made


def test_flags_are_read_with_underscores_or_hyphens() -> None:
    assert parser().read(["--place", "here", "--grow", "--list"]) == Example("here", grow=True)
    for flag in ("--repo_id", "--repo-id"):
        found = own_flags().parse_args(["here", flag, "org/name", "--private"])
        assert vars(found) == {"source": "here", "repo_id": "org/name", "private": True}


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells leave that of --flag=~/place as it is, and files of settings are not theirs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["--place=~/here"], ["--place", "~/here"]):
        assert parser().parse_args(words).place == f"{tmp_path}/here"
    assert parser().parse_args(["--place=a~b"]).place == "a~b"
    (tmp_path / "own.yaml").write_text("dataset_name: ~/images\noutput_dir: ~/runs\n")
    args = parse_arguments(["--config=~/own.yaml"])
    assert (args.dataset_name, args.output_dir) == (f"{tmp_path}/images", f"{tmp_path}/runs")


def test_help_has_the_settings_in_their_order_under_headings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--help", "all"])
    text = capsys.readouterr().out
    order = ["A script.", "--list", "\nlocation:\n", "--place TEXT", "(required)", "\ngrowth:\n",
             "--size N", "--grow [true|false]", "(default: false)", "--rate X"]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(["--help", "all"])
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in fields(PretrainingArguments))
    assert "part such as train[:90%]" in " ".join(text.split())


def test_every_setting_has_a_sentence_and_those_of_choices_name_them_all() -> None:
    sentences: dict[str, str] = {}
    for settings in (EvaluationArguments, ExtractionArguments, PretrainingArguments):
        found = descriptions(settings)
        assert all(found[f.name].endswith(".") for f in fields(settings))
        sentences |= found
    choices = {"protocols": PROTOCOLS, "augmentation": PRESETS, "prime_modality": MODALITIES,
               "image_size": [SMALL_IMAGE]}  # fmt: skip
    for name, words in choices.items():
        assert all(str(word) in sentences[name] for word in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--place=a", "--sizes", "3"], "--sizes is no setting, --size is one"),
        (["--place", "a", "b"], "b is no setting"),
        (["--place", "a", "--"], "-- is no setting"),
        (["--size", "3"], "the following arguments are required: --place"),
        (["--plac", "a"], "--plac is no setting, --place is one"),  # and none is called missing
        (["here", "--repo_id=org/name", "--priv"], "--priv is no setting, --private is one"),
        ([], "the following arguments are required: RUN_OR_DIR, --repo_id/--repo-id"),
        (["--place", "a", "--size", "many"], "argument --size: invalid int value: 'many'"),
    ],
)
def test_words_that_cannot_be_read_are_named_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = words[:1] in ([], ["here"])
    with pytest.raises(SystemExit, match="2"):
        (own_flags() if own else parser()).parse_args(words)
    assert capsys.readouterr().err == f"error: {message}; --help lists the settings.\n"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--batchsize", "batch_size"), ("--batch-sise=8", "batch_size"),
        ("--epochs=3", "num_train_epochs"), ("--lr", "base_lr"), ("--out-dir", "output_dir"),
        ("--weights_decay", "weight_decay"), ("--resume_change", "resume_changed"), ("--xyz", None),
    ],
)  # fmt: skip
def test_the_setting_that_was_meant_is_offered(
    word: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--seed=1", word, "5"])
    hint = "" if meant is None else f", --{meant} is one"
    said = f"error: {word.split('=')[0]} is no setting{hint}; --help lists the settings.\n"
    assert capsys.readouterr().err == said
