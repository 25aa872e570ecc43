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
REFUSED = {
    "search --features absent --query new.jpg -k 0": "k must be positive, got 0",
    "search --features absent --query new.jpg --port 80": "port belongs to serve",
    "search --features absent --query new.jpg": "a directory that extract wrote, got absent",
    "publish absent": "one of repo_id, for an encoder, and space, for a page, must be given",
    "publish absent --repo_id a/b/c": "repo_id must be org/name",
    "publish absent --repo_id a/b --license 'My own'": "license must be an identifier of the Hub",
    "publish absent --repo_id a/b --revision ../b": "revision must be a branch",
    "publish absent --repo_id a/b": "source must be a file or folder that is there, got absent",
    "publish vicreg_hf --space a/b": "a directory that extract wrote, got vicreg_hf",
    "export absent out": "source must be a file or folder that is there, got absent",
    "convert absent.pth out": "checkpoint must be a file or folder that is there, got absent.pth",
}
"""Commands that cannot be, in a folder that holds this package, and what is said of them."""
ASKED = """
import contextlib, io, json, shlex, sys
from vicreg_hf.commands.__main__ import COMMANDS, main
shown = {}
for name in COMMANDS:
    for words in (["--help"], ["--help", "all"]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([name, *words])
        shown[" ".join([name, *words])] = out.getvalue()
for line in json.loads(sys.argv[1]):
    name, *words = shlex.split(line)
    try:
        main([name, *words])
    except SystemExit as ended:
        shown[line] = str(ended.code)
assert "torch" not in sys.modules
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What commands show, or say of what they refuse; it is asserted that no torch is imported."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED, json.dumps([*REFUSED])], cwd=ROOT, check=True,
        env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
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


@pytest.mark.parametrize("line", REFUSED)
def test_what_the_words_alone_rule_out_is_refused_before_torch_is_imported(
    line: str, helps: dict[str, str]
) -> None:
    assert helps[line].startswith("error: ")
    assert REFUSED[line] in helps[line]


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
