"""Settings as command-line flags."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser


class SettingsParser(HfArgumentParser):
    """Read the settings of a dataclass from command-line words, and add flags of a script's own.

    What is no flag is named with the one that was probably meant, in a single line.
    """

    def __init__(
        self, settings: type, *, description: str, headings: Mapping[str, str] | None = None
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

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        # before anything that may seem to be missing
        if mistyped := [w for w in words if w.startswith("--") and w.split("=")[0] not in known]:
            self.error(self._unknown(mistyped))
        read, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(self._unknown(unknown))
        return read

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.rstrip('.')}; --help lists the settings.\n")

    def _unknown(self, words: Sequence[str]) -> str:
        name = words[0].split("=")[0]
        bare = name.lstrip("-").replace("-", "_")
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(bare, flags, n=1, cutoff=0.8)
        near += [flag for flag in flags if bare in flag.split("_") and "prime" not in flag]
        near += difflib.get_close_matches(bare, flags, n=1)
        return f"{name} is no setting" + (f", --{near[0]} is one" if near else "")
