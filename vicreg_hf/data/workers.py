"""Making batches ahead of their use: in loading workers, and for a GPU also in a thread."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.runtime.signals import ignore_requests

MOST_AHEAD = 4
"""Batches, or chunks of a stream, that a loading worker makes ahead at most."""
BYTES_AHEAD = 2 * 2**30
"""Bytes of batches that may wait in shared or pinned memory for a process. All of its workers make
as many batches ahead as stay within it, up to `MOST_AHEAD` each; but one each in any case."""
AHEAD = 2
"""Batches that the thread makes ahead of the one in use."""
WORKER_PATIENCE = 5.0
"""Seconds that loading workers have to end by themselves."""

T = TypeVar("T")


class LoadingError(RuntimeError):
    """A loading worker died."""


def batches_ahead(batch_bytes: int, num_workers: int) -> int:
    """How many batches each of a process's loading workers makes ahead: see `BYTES_AHEAD`."""
    return max(1, min(MOST_AHEAD, BYTES_AHEAD // (batch_bytes * num_workers)))


@contextmanager
def loading(
    source: Any,
    make: Callable[[Any], T],
    num_workers: int,
    *,
    item_bytes: Callable[[], int],
    pinned: bool = False,
) -> Iterator[Iterator[T]]:
    """A function's results for the items of a source, in their order, made by loading workers.

    The workers end with the context. They hear no request to end, and one that was killed may
    leave the others a lock that is never released, so they are killed if they do not end. Enter it
    in the main thread: only there is torch told what a worker died of.

    Args:
        source: a sequence, or an IterableDataset, each worker's part of it.
        item_bytes: called for the size of a result, if there are workers.
        pinned: copy tensors to memory that a GPU reads by itself.
    """
    loader = DataLoader(
        source, batch_size=None, collate_fn=make, num_workers=num_workers, pin_memory=pinned,
        prefetch_factor=batches_ahead(item_bytes(), num_workers) if num_workers else None,
        worker_init_fn=ignore_requests,
    )  # fmt: skip
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
            with suppress(RuntimeError):  # torch raises it for those that are killed
                _start(patience)
                batches._shutdown_workers()
            patience.cancel()
            _kill(workers)


def _start(thread: threading.Thread) -> None:
    """Start a thread; torch's news of a worker's death, which it raises, comes before or after."""
    if not hasattr(signal, "SIGCHLD"):  # Windows
        return thread.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_of_any(workers: Sequence[Any]) -> str | None:
    """How one of them ended, if one has by now or does within seconds."""
    ended = connection.wait([worker.sentinel for worker in workers], timeout=5)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(5)  # its files are closed a moment before it has a status
            if (status := worker.exitcode) is not None:
                by = signal.strsignal(-status) if status < 0 else f"exit status {status}"
                return f"it was ended by {by}"
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
        raise LoadingError(_cause_of_death(f"the connection to it was lost: {error}")) from None
    except RuntimeError as error:
        # torch's signal handler knows of what the worker died, and its loader only that it did
        for message in (str(error.__cause__), str(error)):
            if "DataLoader worker" in message:
                raise LoadingError(_cause_of_death(message)) from None
        raise


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


def prefetch(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Pass batches on; on a GPU a thread makes them ahead, on a stream of its own.

    On a CPU the cores have enough to do with the present batch.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def make() -> tuple[T, Any] | None:
        # a new thread's device is the first, on which going back to it would begin to use memory
        torch.cuda.set_device(stream.device)
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    with closing(made_ahead(make)) as ahead:
        for batch, made in ahead:
            current = torch.cuda.current_stream(device)
            current.wait_event(made)
            for tensor in tree_leaves(batch):
                tensor.record_stream(current)  # its memory may not be reused before
            yield batch


def made_ahead(make: Callable[[], T | None]) -> Generator[T]:
    """The results of calls until one is None, `AHEAD` of them made ahead in a thread."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        waiting = deque(thread.submit(make) for _ in range(AHEAD))
        while (made := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(make))
            yield made
    finally:
        thread.shutdown(cancel_futures=True)
