"""What search can be asked for, which is checked before anything is imported that takes seconds."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

HOST = "127.0.0.1"
"""Where the page is shown: on this machine alone."""
RECORD = "extraction.json"
"""The file beside extracted features that says of what they are."""


def check_search(
    features: str, query: Sequence[str], *, k: int, html: str | None = None, port: int | None = None
) -> None:
    """Refuse a search that cannot be.

    Args:
        features: directory that `extract` wrote.
        query: files of new images.
        k: images that are found for each.
        html: a page to write.
        port: of a page to show.

    Raises:
        ValueError: one of them is not there, cannot be written, or is in use.
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}.")
    if html is not None:
        path = Path(html)
        if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
            raise ValueError(f"html must be a file whose name ends with .html, got {path}.")
        if not path.parent.is_dir():
            raise ValueError(f"html must be in a folder that is there, got {path}; make it first.")
    if port is not None:
        _check_port(port)
    check_features(features)
    check_queries(query)


def check_features(directory: str | Path) -> None:
    """Raise a ValueError where a directory holds no extracted features."""
    if not Path(directory, RECORD).is_file():
        raise ValueError(f"features must be a directory that extract wrote, got {directory}.")


def check_queries(paths: Sequence[str]) -> None:
    """Raise a ValueError where the file of a new image is not there."""
    absent = [path for path in paths if not Path(path).is_file()]
    if absent:
        what = "a folder; give its files" if Path(absent[0]).is_dir() else "none"
        raise ValueError(f"query must be files of images, got {absent[0]!r}, which is {what}.")


def _check_port(port: int) -> None:
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port must be free, from 1024 to 65535, got {port} ({error}); without it one that is "
            "free is taken."
        ) from None
