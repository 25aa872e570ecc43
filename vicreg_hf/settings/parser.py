"""Settings and other flags of a command line."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser

from vicreg_hf.settings.base import Settings, descriptions
from vicreg_hf.settings.recipes import as_flags, read_recipe


def expand_home(words: Iterable[str]) -> list[str]:
    """Replace a leading ~ by the home directory, as shells do, but not in --flag=~/place."""
    expanded = []
    for word in words:
        flag, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        expanded.append(f"{flag}{sign}{os.path.expanduser(value)}")
    return expanded


class FlagsParser(argparse.ArgumentParser):
    """Read a script's own flags, with hyphens or underscores.

    An error is a single line, which offers the flag that was probably meant.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, allow_abbrev=False)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        hyphened = {name.replace("_", "-"): None for name in names if name.startswith("--")}
        return super().add_argument(*dict.fromkeys([*names, *hyphened]), **options)

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

    def __init__(
        self,
        settings: type[Settings],
        *,
        description: str = "",
        headings: Mapping[str, str] | None = None,
    ) -> None:
        """Make a flag of every field.

        Args:
            headings: headings of --help, each by the field below it.
        """
        self._settings, self._descriptions = settings, descriptions(settings)
        self._headings, self._section = dict(headings or {}), None
        super().__init__(settings, usage="%(prog)s [--SETTING VALUE ...]", description=description)
        assert not self._headings, "a heading must stand above a setting"
        self._section = None  # nor does it stand above what a script adds

    def add_argument(self, *names: Any, **options: Any) -> Any:
        name = names[0].lstrip("-")
        sentence = self._descriptions.get(name.removeprefix("no_"), "")
        options.setdefault("help", sentence.replace("%", "%%"))
        if name in self._headings:
            self._section = self.add_argument_group(self._headings.pop(name))
        if self._section is not None:
            return self._section.add_argument(*names, **options)
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
