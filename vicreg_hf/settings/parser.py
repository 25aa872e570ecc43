"""Settings and other words of a command line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser


def at_home(words: Iterable[str]) -> list[str]:
    """Words with the home directory for a leading ~, which shells put into some of them only."""
    found = []
    for word in words:
        name, sign, value = word.partition("=")
        is_flag = sign and name.startswith("--")
        found.append(f"{name}={os.path.expanduser(value)}" if is_flag else os.path.expanduser(word))
    return found


class _InOneLine(argparse.ArgumentParser):
    """Says in a single line what is wrong, and of what is no flag which one was probably meant."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = at_home(sys.argv[1:] if args is None else args)
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
        """End with what is wrong with words that nothing here is called."""
        name = words[0].split("=")[0]
        bare = name.lstrip("-").replace("-", "_")
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(bare, flags, n=1, cutoff=0.8)
        near += [flag for flag in flags if bare in flag.split("_") and "prime" not in flag]
        near += difflib.get_close_matches(bare, flags, n=1)
        self.error(f"{name} is no setting" + (f", --{near[0]} is one" if near else ""))


class FlagsParser(_InOneLine):
    """Read a script's own flags, with hyphens or underscores."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, allow_abbrev=False)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._underscored(word) for word in words], namespace)

    def _underscored(self, word: str) -> str:
        name, *value = word.split("=", 1)
        flag = "--" + name[2:].replace("-", "_")
        known = name.startswith("--") and flag in self._option_string_actions
        return "=".join([flag, *value]) if known else word


class SettingsParser(_InOneLine, HfArgumentParser):
    """Read the settings of a dataclass from command-line words, and add flags of a script's own."""

    def __init__(
        self, settings: type, *, description: str = "", headings: Mapping[str, str] | None = None
    ) -> None:
        """Make a flag of every field.

        Args:
            headings: for --help, each by the field that it stands above.
        """
        self._headings, self._section = dict(headings or {}), None
        super().__init__(
            settings,  # pyright: ignore[reportArgumentType]
            allow_abbrev=False,
            usage="%(prog)s [--SETTING VALUE ...]",
            description=description,
        )
        assert not self._headings, "a heading must stand above a setting"
        self._section = None  # nor does it stand above what a script adds

    def add_argument(self, *names: Any, **given: Any) -> Any:
        name = names[0].lstrip("-")
        if name in self._headings:
            self._section = self.add_argument_group(self._headings.pop(name))
        if self._section is not None:
            return self._section.add_argument(*names, **given)
        return super().add_argument(*names, **given)
