"""The installed command: finding its commands, and what their --help shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from workflow import ROOT, environment

from vicreg_hf import EvaluationArguments, PretrainingArguments, __version__
from vicreg_hf.commands.__main__ import COMMANDS, main
from vicreg_hf.settings.extraction import ExtractionArguments

KINDS = {
    "pretrain": PretrainingArguments, "evaluate": EvaluationArguments,
    "extract": ExtractionArguments,
}  # fmt: skip
HELP = """
import contextlib, io, json, sys
from vicreg_hf.commands.__main__ import COMMANDS, main
shown = {}
for name in COMMANDS:
    for words in (["--help"], ["--help", "all"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([name, *words])
        shown[" ".join([name, *words])] = out.getvalue()
assert "torch" not in sys.modules
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each command shows; that no torch is imported for it is asserted on the way."""
    done = subprocess.run(
        [sys.executable, "-c", HELP], env=environment(PYTHONPATH=str(ROOT)), check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def flags(text: str) -> Counter[str]:
    return Counter(re.findall(r"^  --?([\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_about_ten_flags_and_all_of_them_once_when_asked(
    command: str, helps: dict[str, str]
) -> None:
    few, every = (helps[f"{command} --help{more}"] for more in ("", " all"))
    for text in (few, every):
        assert text.startswith(f"usage: vicreg-hf {command} ")
        assert set(flags(text).values()) == {1}
    assert len(flags(few)) <= 11  # --help is one of them
    if command in KINDS:
        names = {f.name for f in fields(KINDS[command])}
        assert set(KINDS[command].usual) <= flags(few).keys() & names
        assert names <= flags(every).keys()
        assert f"lists {len(flags(every)) - len(flags(few))} more settings" in few
        assert KINDS[command].headings.keys() <= names
        headings = [f"{heading}:" for heading in KINDS[command].headings.values()]
        assert [line for line in every.splitlines() if line in headings] == headings
        assert "(default: 256)" in every
        assert "None" not in every


def test_the_commands_are_the_modules_and_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {file.stem for file in Path(ROOT, "vicreg_hf/commands").glob("[!_]*.py")}
    assert modules == set(COMMANDS)
    for words in ([], ["--help"]):
        main(words)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == [*COMMANDS]
    main(["--version"])
    assert capsys.readouterr().out == f"vicreg-hf {__version__}\n"


def test_another_command_is_refused_and_the_one_meant_is_offered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, sentence in {
        "pretain": "pretain is no command, pretrain is one", "zzz": "zzz is no command",
        "extract_features": "extract_features is no command, extract is one",
        "--config=demo": "a command must come before its settings, got --config=demo",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main([word])
        assert capsys.readouterr().err == f"error: {sentence}; vicreg-hf lists the commands.\n"


def test_a_recipe_is_printed_as_it_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tiny-cpu", "evaluation/paper"):
        main(["recipes", Path(name).name])
        shipped = (ROOT / "vicreg_hf" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert capsys.readouterr().out == shipped
    with pytest.raises(SystemExit, match=r"error: a recipe must be one of .* tiny-cpu is one\."):
        main(["recipes", "tinycpu"])
