"""Settings and other flags of a command line."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from vicreg_hf.settings.base import Settings, descriptions
from vicreg_hf.settings.recipes import as_flags, read_recipe


def expand_home(words: Iterable[str]) -> list[str]:
    """Replace a leading ~ by the home directory, as shells do, but not in --flag=~/place."""
    expanded = []
    for word in words:
        flag, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{flag}{sign}{os.path.expanduser(value)}")
    return expanded


class _Formatter(argparse.HelpFormatter):
    """Names each flag once, with the kind of its value, and the default where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        kinds: dict[Any, str] = {int: "N", float: "X", string_to_bool: "true|false"}
        values = self._format_args(action, kinds.get(action.type, "TEXT"))
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        sentence, default = action.help or "", action.default
        if action.required and action.option_strings:
            return f"{sentence} (required)"
        if default in (None, "", argparse.SUPPRESS) or action.nargs == 0:
            return sentence
        word = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{sentence} (default: {word.replace('%', '%%')})"


class _Help(argparse.Action):
    """Print the usual flags, or `all` of them, and exit."""

    def __call__(self, parser: Any, _: Any, values: Any, *__: Any) -> None:
        assert isinstance(parser, FlagsParser)
        print(parser.format_help(everything=values == "all"), end="")
        parser.exit()


class _Joined(argparse.Action):
    """Keep several words as one text, joined by commas."""

    def __call__(self, _: Any, namespace: Any, values: Any, *__: Any) -> None:
        setattr(namespace, self.dest, ",".join(values))


class FlagsParser(argparse.ArgumentParser):
    """Read a script's own flags, with hyphens or underscores.

    An error is a single line, which offers the flag that was probably meant.
    """

    def __init__(self, *args: Any, add_help: bool = True, **options: Any) -> None:
        self._rare: list[argparse.Action] = []
        self._section: Any = None
        options.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **options, add_help=False, allow_abbrev=False)
        if add_help:
            self._section = None
            self.add_argument(
                "--help", "-h", action=_Help, nargs="?", metavar="all", default=argparse.SUPPRESS,
                help="Show this, or every setting.",
            )  # fmt: skip

    def add_argument(self, *names: Any, usual: bool = True, **options: Any) -> Any:
        """Add a flag, as argparse does.

        Args:
            usual: whether --help lists it; --help all lists every flag.
        """
        hyphened = {name.replace("_", "-"): None for name in names if name.startswith("--")}
        add = super().add_argument if self._section is None else self._section.add_argument
        action = add(*dict.fromkeys([*names, *hyphened]), **options)
        if not usual:
            self._rare.append(action)
        return action

    def format_help(self, *, everything: bool = False) -> str:
        """The usual flags below their headings, or all of them."""
        hidden = [] if everything else self._rare
        formatter = self._get_formatter()
        formatter.add_usage(self._usage(), self._actions, [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_arguments([one for one in group._group_actions if one not in hidden])
            formatter.end_section()
        if hidden:
            formatter.add_text(f"--help all lists {len(hidden)} more settings.")
        return formatter.format_help()

    def _usage(self) -> str | None:
        """A line that names no flag, as all are listed below it; that of argparse for commands."""
        given = [one for one in self._actions if not one.option_strings]
        if self.usage or any(one.nargs == argparse.PARSER for one in given):
            return self.usage
        places = [str(one.metavar or one.dest) for one in given]
        return " ".join(["%(prog)s", *places, "[--SETTING VALUE ...]"])

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = expand_home(sys.argv[1:] if args is None else args)
        for at in range(len(words) - 1, 0, -1):  # --value_range -1000,400, whose - begins no flag
            if re.match(r"-[\d.]", words[at]) and words[at - 1].startswith("--"):
                words[at - 1 : at + 1] = [f"{words[at - 1]}={words[at]}"]
        known = {flag.replace("_", "-") for flag in self._option_string_actions}
        names = {word: word.split("=")[0].replace("_", "-") for word in words if word[:2] == "--"}
        # before anything that may seem to be missing
        if mistyped := [word for word, name in names.items() if name not in known]:
            self.refuse(mistyped)
        read, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.refuse(unknown)
        return read

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.rstrip('.')}; --help lists the settings.\n")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End the script with a line about words that are no flags."""
        name = words[0].split("=")[0]
        bare = name.lstrip("-").replace("-", "_")
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(bare, flags, n=1, cutoff=0.8)
        near += [flag for flag in flags if bare in flag.split("_") and "prime" not in flag]
        near += difflib.get_close_matches(bare, flags, n=1)
        self.error(f"{name} is no setting" + (f", --{near[0]} is one" if near else ""))


class SettingsParser(FlagsParser, HfArgumentParser):
    """Read settings and a script's own flags from command-line words."""

    def __init__(self, settings: type[Settings], *, description: str = "") -> None:
        """Make a flag of every field, below the headings of its class."""
        self._settings, self._descriptions = settings, descriptions(settings)
        self._fields = {f.name for f in fields(settings)}
        super().__init__(settings, description=description)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        name, usual = names[0].lstrip("-"), self._settings.usual
        options.setdefault("help", self._descriptions.get(name, "").replace("%", "%%"))
        if name.removeprefix("no_") in self._fields - {name}:
            options["help"] = argparse.SUPPRESS  # --no_field, which is --field false
        elif name in self._fields:
            options.setdefault("usual", name in usual or not usual)
        if name in self._settings.several:
            options |= {"nargs": "+", "action": _Joined}
        if name in self._settings.headings:
            self._section = self.add_argument_group(self._settings.headings[name])
        return super().add_argument(*names, **options)

    def read(self, words: Sequence[str], recipe: str | None = None) -> Any:
        """The settings from a recipe, and on top of it command-line words.

        Args:
            recipe: the name of a shipped recipe, or a YAML file.

        Raises:
            ValueError: no such recipe, or a setting outside its limits.
            SystemExit: words that are not flags, or --help.
        """
        settings = read_recipe(recipe, self._settings) if recipe else {}
        given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words}
        first, second = settings.get("init_from"), settings.get("prime_init_from")
        if "init_from" in given and first is not None and first == second:
            given.add("prime_init_from")  # it had followed from the first
        for ahead in ("", "prime_"):
            if f"{ahead}init_from" in given:  # what the recipe starts from is replaced as a whole
                for name in ("init_from", "architecture", "model_args", "pretrained"):
                    settings.pop(f"{ahead}{name}", None)
        flags = as_flags(settings)
        values = vars(self.parse_args([*flags, *words]))
        return self._settings(**{f.name: values[f.name] for f in fields(self._settings)})
