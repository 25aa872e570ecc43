"""The settings of search, which are checked before anything is imported that takes seconds."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vicreg_hf.settings.base import Count, Settings

HOST = "127.0.0.1"
"""Where the page is shown: on this machine alone."""
RECORD = "extraction.json"
"""The file beside extracted features that says of what they are."""


@dataclass(frozen=True)
class SearchArguments(Settings):
    """Which features are searched, for what, and how the answer is shown."""

    features: str
    """Directory that `extract` wrote."""
    _: KW_ONLY
    query: Sequence[str] | None = None
    """Files of new images."""
    serve: bool = False
    """Show a page into which new images are dropped."""
    k: Count = 8
    """Images that are found for each."""
    html: str | None = None
    """A page that is written."""
    port: int | None = None
    """Port of the page that is shown; None takes a free one."""
    split: str | None = None
    """The split that is searched; None searches all."""
    model: str | None = None
    """The encoder, by default where it was when the features were extracted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong, other = ("html", "query") if self.serve else ("port", "serve")
        if getattr(self, wrong) is not None:
            raise ValueError(f"{wrong} belongs to {other}; leave it out.")
        if self.html is not None:
            check_page(Path(self.html))
        if self.port is not None:
            check_port(self.port)
        check_features(Path(self.features))
        check_queries(self.query or ())


def check_features(directory: Path) -> None:
    """Make sure that a directory holds extracted features.

    Raises:
        ValueError: it does not.
    """
    if not (directory / RECORD).is_file():
        raise ValueError(f"features must be a directory that extract wrote, got {directory}.")


def check_queries(paths: Sequence[str]) -> None:
    """Make sure that the files of new images are there.

    Raises:
        ValueError: one is not.
    """
    absent = [path for path in paths if not Path(path).is_file()]
    if absent:
        what = "a folder; give its files" if Path(absent[0]).is_dir() else "none"
        raise ValueError(f"query must be files of images, got {absent[0]!r}, which is {what}.")


def check_page(path: Path) -> None:
    """Make sure that a page can be written there.

    Raises:
        ValueError: its name is not that of a page, or its folder is not there.
    """
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"html must be a file whose name ends with .html, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"html must be in a folder that is there, got {path}; make it first.")


def check_port(port: int) -> None:
    """Make sure that a port can be taken.

    Raises:
        ValueError: it cannot.
    """
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port must be free, from 1024 to 65535, got {port} ({error}); without it one that is "
            "free is taken."
        ) from None
