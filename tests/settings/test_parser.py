"""Settings as flags: what --help shows, and what is said of words that are none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vicreg_hf.settings.command_line import parse_arguments, parse_evaluation_arguments
from vicreg_hf.settings.parser import FlagsParser, SettingsParser


@dataclass
class Settings:
    """With one that must be given."""

    place: str = field(metadata={"help": "Where."})
    size: int = field(default=1, metadata={"help": "How large."})
    grow: bool = field(default=False, metadata={"help": "Or not."})


def parser(**headings: str) -> SettingsParser:
    made = SettingsParser(Settings, description="A script.", headings=headings)
    made.add_argument("--list", action="store_true", help="Its own.")
    return made


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words)
    return capsys.readouterr().err


def test_flags_are_read() -> None:
    found = parser().parse_args(["--place", "here", "--grow", "--list"])
    assert vars(found) == {"place": "here", "size": 1, "grow": True, "list": True}


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
        parser(place="location", size="growth").parse_args(["--help"])
    text = capsys.readouterr().out
    order = ["A script.", "--list", "\nlocation:\n", "--place PLACE", "\ngrowth:\n", "--size SIZE",
             "--grow"]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_a_heading_of_no_setting_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="above a setting"):
        parser(places="location")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--place=a", "--sizes", "3"], "--sizes is no setting, --size is one"),
        (["--plaec", "a"], "--plaec is no setting, --place is one"),
        (["--place", "a", "b"], "b is no setting"),
        (["--place", "a", "-x"], "-x is no setting"),
        (["--place", "a", "--"], "-- is no setting"),
        (["--size", "3"], "the following arguments are required: --place"),
        (["--place", "a", "--size", "many"], "argument --size: invalid int value: 'many'"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(words, capsys) == f"error: {message}; --help lists the settings.\n"


def test_one_full_stop_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["--place", "a", "--grow", "maybe"], capsys)
    assert "maybe" in said
    assert "." not in said[:-2]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--batchsize", "batch_size"), ("--batch-sise=8", "batch_size"),
        ("--epochs=3", "num_train_epochs"), ("--lr", "base_lr"), ("--out-dir", "output_dir"),
        ("--compile_modle", "compile_model"), ("--weights_decay", "weight_decay"),
        ("--resume_change", "resume_changed"), ("--xyz", None),
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


def test_a_mistyped_setting_is_named_and_not_called_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_evaluation_arguments(["--model", "m", "--datasetname", "d"])
    assert "--datasetname is no setting, --dataset_name is one" in capsys.readouterr().err


def own_flags() -> FlagsParser:
    made = FlagsParser(description="A script.")
    made.add_argument("source", metavar="RUN_OR_DIR")
    made.add_argument("--repo_id", required=True)
    made.add_argument("--private", action="store_true")
    return made


@pytest.mark.parametrize("flag", ["--repo_id", "--repo-id"])
def test_a_scripts_own_flags_take_hyphens_too(flag: str) -> None:
    found = own_flags().parse_args(["here", flag, "org/name", "--private"])
    assert vars(found) == {"source": "here", "repo_id": "org/name", "private": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repoid", "org/name"], "--repoid is no setting, --repo_id is one"),
        (["here", "--repo_id=org/name", "--priv"], "--priv is no setting, --private is one"),
        ([], "the following arguments are required: RUN_OR_DIR, --repo_id"),
    ],
)
def test_a_scripts_own_flags_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        own_flags().parse_args(words)
    assert capsys.readouterr().err == f"error: {message}; --help lists the settings.\n"
