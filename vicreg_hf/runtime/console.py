"""Output whose readers may leave, warnings, and extras that may fail without ending a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.signals import Stopped


@contextmanager
def optional(consequence: str) -> Iterator[None]:
    """Let a block fail, with a warning on stderr, as the work can be finished without it.

    Args:
        consequence: a clause on what is missing then, such as "the card has no pictures".

    Raises:
        Stopped: the block was asked to stop, which is no failure.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)[:300]}".removesuffix(": ")
        warn(f"{consequence}: {reason}")


def outlive_readers() -> None:
    """Drop what stdout and stderr do not take, such as for `| head` or on a full disk."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Patient):
            setattr(sys, name, _Patient(stream))


def is_main() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def warn(sentence: str, *, everywhere: bool = False) -> None:
    """Print a warning on stderr, in the first process alone.

    Args:
        everywhere: print it in any other process too, with its rank.
    """
    if is_main() or everywhere:
        who = "" if is_main() else f" of process {os.environ['RANK']}"
        print(f"warning{who}: {sentence}", file=sys.stderr, flush=True)


class _Patient:
    """A stream as it is, but that writing to it never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *words: str) -> None:
        try:
            getattr(self._stream, method)(*words)
        except (OSError, ValueError):  # no reader, no room, or closed
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # what is buffered goes there, too
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
