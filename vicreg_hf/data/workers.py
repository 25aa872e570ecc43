"""Loading workers: how they end, and one sentence instead of what torch says of their death."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch.utils.data import DataLoader

from vicreg_hf.data.columns.image_files import ImageError

WORKER_PATIENCE = 5.0
"""Seconds that loading workers have to end by themselves."""


class LoadingError(RuntimeError):
    """A loading worker died."""


@contextmanager
def loading(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives, whose workers end with the context, whatever they wait for.

    They hear no request to end, and one that was killed may leave the others a lock that is never
    released. To be entered in the main thread, where alone torch hears of what a worker died.
    """
    batches: Any = iter(loader)
    workers: list[Any] = getattr(batches, "_workers", [])
    try:
        yield batches
    except (ConnectionError, EOFError) as error:  # torch has not heard of it yet
        if (end := _end_of_any(workers)) is None:
            raise
        raise LoadingError(_cause_of_death(end)) from error
    finally:
        if workers:
            patience = threading.Timer(WORKER_PATIENCE, _kill, [workers])
            patience.start()
            with suppress(RuntimeError):  # torch's, of those that are killed
                batches._shutdown_workers()
            patience.cancel()
            _kill(workers)


def _end_of_any(workers: Sequence[Any]) -> str | None:
    """How one of them ended, if one has by now or does within a second."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        for status in (worker.exitcode for worker in workers):
            if status is not None:
                by = signal.strsignal(-status) if status < 0 else f"exit status {status}"
                return f"it was ended by {by}"
        time.sleep(0.01)
    return None


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def loading_errors() -> Iterator[None]:
    """One sentence instead of a worker's traceback, wherever torch raises it.

    Raises:
        ImageError: as the worker did.
        LoadingError: the worker died, and from what.
    """
    try:
        yield
    except ImageError as error:
        sentence = str(error).strip().splitlines()[-1]
        raise ImageError(sentence.split("ImageError: ", 1)[-1]) from None
    except (ConnectionError, EOFError) as error:  # killed in the middle of a batch
        cause = f"the connection to it was lost: {error}"
        raise LoadingError(_cause_of_death(cause)) from None
    except RuntimeError as error:
        # torch's signal handler knows of what the worker died, and its loader only that it did
        messages = [str(cause) for cause in (error.__cause__, error) if cause is not None]
        messages = [message for message in messages if "DataLoader worker" in message]
        if not messages:
            raise
        raise LoadingError(_cause_of_death(messages[0])) from None


def _cause_of_death(message: str) -> str:
    sentence = message.strip().splitlines()[0].rstrip(". ")
    if "Killed" in message:
        why = (
            "Something outside this program killed it, mostly for want of memory: lower "
            "--num_workers or free some."
        )
    elif "Bus error" in message or "shm" in message or "shared memory" in message:
        why = (
            "Shared memory is full: enlarge /dev/shm (docker: --shm-size), or lower --num_workers."
        )
    else:
        why = "With --num_workers 0 the main process decodes, and shows what fails."
    return f"a loading worker died: {sentence}. {why} The last checkpoint is untouched."
