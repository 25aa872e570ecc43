"""The directory of a run: one run in it at a time, and room for what the next one writes."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from vicreg_hf.runtime.distributed import failing_together, gather_objects
from vicreg_hf.runtime.files import writing

LOCK = ".lock"
LOCK_PATIENCE = 5.0
"""Seconds to wait for a run that is just ending."""


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, which is made if absent.

    The main process of a run locks a file in it, unless the file system has no locks. The lock
    ends with the process, however that ends.

    Raises:
        ValueError: the directory cannot be written, or another run is in it and does not end
            within `LOCK_PATIENCE`.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK).touch()
    lock = FileLock(directory / LOCK, timeout=LOCK_PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output_dir must not be in use by another run, and {directory} is; wait for it, stop "
            "it, or choose another output_dir."
        ) from error
    except OSError:  # the file system has no locks
        pass
    try:
        yield
    finally:
        lock.release()


def set_aside(directory: Path, names: Iterable[str], say: Callable[[str], object]) -> None:
    """Move those of some files and folders that are there into `earlier-N`, and say so."""
    found = [name for name in names if (directory / name).exists()]
    if not found:
        return
    number = next(n for n in itertools.count(1) if not (directory / f"earlier-{n}").exists())
    place = directory / f"earlier-{number}"
    place.mkdir()
    for name in found:
        (directory / name).rename(place / name)
    say(f"What was in {directory} before is now in {place}: {', '.join(found)}.")


def check_shared(directory: Path) -> None:
    """Refuse a directory that is another one, or none, on some of the nodes of a run.

    Every process must call this, once the main process has made the directory.

    Raises:
        ValueError: this process does not see there what the main process writes, or cannot write.
        OtherProcessFailed: that is so in another process.
    """
    rule = f"every process must write to the same {directory}, and this one"
    remedy = "choose an output_dir that all nodes share."
    with ExitStack() as stack:
        with failing_together(torch.device("cpu")):
            try:
                own = stack.enter_context(tempfile.NamedTemporaryFile(dir=directory))
            except OSError as error:
                raise ValueError(f"{rule} cannot ({error}); {remedy}") from error
        main = Path(gather_objects([own.name])[0]).name
        with failing_together(torch.device("cpu")):
            if not (directory / main).exists():
                raise ValueError(f"{rule} sees no file of the main process there; {remedy}")
