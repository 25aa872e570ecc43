"""The page that searches a data set, on this machine alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

from vicreg_hf.evaluation.report.gallery import STYLES
from vicreg_hf.features.search import QueryError, Search, open_search
from vicreg_hf.runtime.files import temporary_folder
from vicreg_hf.search_pages.app import CSS, Case, UnusableError, launch, page
from vicreg_hf.search_pages.hits import cases, describe, pictures_of
from vicreg_hf.settings.searching import HOST


def finder(search: Search, k: int) -> Callable[[str], Case]:
    """A function that finds the k images most like that of a file, as `page` takes it."""
    search = replace(search, parts=list(search.parts))  # each query needs all of them
    pictures = pictures_of(search)

    def find(path: str) -> Case:
        try:
            found = search.find([path], k)
        except QueryError as error:
            raise UnusableError(f"This file cannot be used: {error.reason}") from error
        (case,) = cases(search, found, pictures)
        return case

    return find


def serve(
    features: str, *, k: int = 8, split: str | None = None, model: str | None = None,
    port: int | None = None,
) -> None:  # fmt: skip
    """Show the page until the process is stopped.

    What is dropped into it is encoded here, and deleted at the end; nothing leaves this machine.

    Args:
        features: as for `open_search`, with split and model.
        k: images that are found for each.
        port: None takes a free one from 7860 on.

    Raises:
        ValueError: as for `open_search`.
    """
    search = open_search(features, split=split, model=model)
    find, (title, about) = finder(search, k), describe(search)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with temporary_folder() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        css = (STYLES / CSS).read_text(encoding="utf-8")
        blocks = page(find, title=title, about=about, css=css)
        address = launch(blocks, server_name=HOST, server_port=port)
        print(f"Open {address} in a browser on this machine; Ctrl-C ends it.", flush=True)
        blocks.block_thread()
