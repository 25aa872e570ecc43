"""Making batches ahead of their use: in loading workers, and for a GPU also in a thread."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from multiprocessing import connection, queues
from typing import Any, Generic, TypeVar

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.console import warn
from vicreg_hf.runtime.signals import StoppedWaiting, ignore_requests, stop_requested

MOST_AHEAD = 4
"""Batches, or chunks of a stream, that a loading worker makes ahead at most."""
BYTES_AHEAD = 2 * 2**30
"""Bytes of batches that may wait in shared or pinned memory for a process. All of its workers make
as many batches ahead as stay within it, up to `MOST_AHEAD` each; but one each in any case."""
AHEAD = 2
"""Batches that the thread makes ahead of the one in use."""
WORKER_PATIENCE = 5.0
"""Seconds that loading workers have to end by themselves."""
WAITING = 5
"""Seconds of waiting for a batch after which a request to stop is heard."""
SILENCE = 60
"""Seconds without a batch after which a run says that it waits for data, and so each time."""
SHARED_MEMORY = "/dev/shm"
FAULTS = {errno.ENOSPC: "No space left", errno.EMFILE: "Too many open files"}
"""The exit status of a worker that cannot pass a batch on, and words of the error it met."""

T = TypeVar("T")


class LoadingError(RuntimeError):
    """A loading worker died, or none could be started."""


def batches_ahead(batch_bytes: int, num_workers: int, room: float = math.inf) -> int:
    """How many batches each of a process's loading workers makes ahead: see `BYTES_AHEAD`.

    Args:
        room: bytes of shared memory for them, and for two batches in use.

    Returns:
        0 if the room is too small for one each.
    """
    ahead = max(1, min(MOST_AHEAD, BYTES_AHEAD // (batch_bytes * num_workers)))
    return max(0, int(min(ahead, (room - 2 * batch_bytes) // (batch_bytes * num_workers))))


def _shared_memory() -> float:
    """Bytes of shared memory that are free, divided among the machine's processes of the run."""
    if not os.path.isdir(SHARED_MEMORY):
        return math.inf
    return shutil.disk_usage(SHARED_MEMORY).free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
    in the main thread: only there is torch told what a worker died of. Results come in shared
    memory, or through pipes where that is too small.

    Args:
        source: a sequence, or an IterableDataset, each worker's part of it.
        item_bytes: called for the size of a result, if there are workers.
        pinned: copy tensors to memory that a GPU reads by itself.

    Raises:
        LoadingError: workers cannot be started.
    """
    with loading_passes(
        source, make, num_workers, item_bytes=item_bytes, pinned=pinned, number=1
    ) as passes:
        yield next(passes)


@contextmanager
def loading_passes(
    source: Any,
    make: Callable[[Any], T],
    num_workers: int,
    *,
    item_bytes: Callable[[], int],
    pinned: bool = False,
    number: int | None = None,
) -> Iterator[Iterator[Iterator[T]]]:
    """`loading` of one pass over the source after the other, with the same workers for all.

    Args:
        number: of passes; without end by default.
    """
    if not num_workers:
        loader = DataLoader(source, batch_size=None, collate_fn=make, pin_memory=pinned)
        yield (iter(loader) for _ in repeat(None))
        return
    size = item_bytes()
    ahead = batches_ahead(size, num_workers, _shared_memory())
    if not ahead:
        _tell_of_pipes(num_workers)
    loader = DataLoader(
        source, batch_size=None, collate_fn=make if ahead else _Pickled(make), pin_memory=pinned,
        num_workers=num_workers, prefetch_factor=max(1, ahead), timeout=WAITING,
        worker_init_fn=_begin_work, persistent_workers=number != 1,
    )  # fmt: skip
    batches = _start_workers(loader)
    workers: list[Any] = batches._workers
    try:
        found = _passes(loader, batches)
        yield found if ahead else (map(pickle.loads, each) for each in found)
    except (ConnectionError, EOFError) as error:  # torch has not heard of it yet
        if (end := _end_of_any(workers)) is None:
            raise
        raise LoadingError(_cause_of_death(end)) from error
    finally:
        patience = threading.Timer(WORKER_PATIENCE, _kill, [workers])
        with suppress(RuntimeError):  # torch raises it for those that are killed
            _start(patience)
            batches._shutdown_workers()
        patience.cancel()
        _kill(workers)


@cache
def _tell_of_pipes(num_workers: int) -> None:
    warn(
        f"{SHARED_MEMORY} has {_shared_memory() / 2**20:.0f} MiB for each process, too little for "
        f"the batches of {num_workers} loading workers, so they come through pipes, which is "
        "slower; enlarge it (docker: --shm-size).",
        everywhere=True,
    )


def _start_workers(loader: DataLoader[Any]) -> Any:
    """The iterator of a loader; where not all its workers can be started, none is left."""
    others = set(multiprocessing.active_children())
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        return iter(loader)
    except OSError as error:
        _kill(set(multiprocessing.active_children()) - others)
        error.__traceback__ = None  # frees torch's unfinished iterator, which fails at its end
        raise
    finally:
        sys.unraisablehook = hook


def _passes(loader: DataLoader[Any], batches: Any) -> Iterator[Iterator[Any]]:
    yield _each(batches)
    while True:
        batches._timeout = 0  # a worker without work answers at once, and no answer may be missed
        iter(loader)
        batches._timeout = WAITING
        yield _each(batches)


@dataclass
class _Pickled(Generic[T]):
    """A function whose results are bytes, which do not need shared memory."""

    make: Callable[[Any], T]

    def __call__(self, item: Any) -> bytes:
        return pickle.dumps(self.make(item), pickle.HIGHEST_PROTOCOL)


def _each(batches: Iterator[T]) -> Iterator[T]:
    """Pass batches on, and say when none comes.

    Raises:
        StoppedWaiting: none came for `WAITING` seconds, and the run has been asked to stop.
        LoadingError: none came for `SILENCE` seconds, of several processes that were.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # otherwise the rest waits for this one
    waited = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out after"):
                raise
            waited += WAITING
            if stop_requested() and alone:
                raise StoppedWaiting(
                    f"Stopped after {waited} seconds without a batch. Started again with the same "
                    "settings, the run goes on."
                ) from None
            if waited % SILENCE == 0:
                if stop_requested():
                    raise LoadingError(
                        f"no batch came for {waited} seconds, and the run was asked to stop. The "
                        "last checkpoint is untouched."
                    ) from None
                warn(
                    f"no batch has come from the loading workers for {waited} seconds; the data "
                    "are slow to read, or a worker is stuck.",
                    everywhere=True,
                )
            continue
        waited = 0
        yield batch


def _begin_work(worker: int) -> None:
    """Make a worker end, with a status that tells why, where it cannot pass a batch on."""
    ignore_requests(worker)
    queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # pyright: ignore


def _end_worker(error: Exception, _batch: object) -> None:
    for status, words in FAULTS.items():
        if getattr(error, "errno", None) == status or words in str(error):
            os._exit(status)
    os.write(2, f"a loading worker cannot pass a batch on: {one_line(error)}\n".encode())
    os._exit(1)


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


def _kill(workers: Iterable[Any]) -> None:
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
    except LoadingError:
        raise
    except (OSError, RuntimeError) as error:
        # torch's signal handler knows of what the worker died, and its loader only that it did
        for message in (str(error.__cause__), str(error)):
            if "DataLoader worker" in message:
                raise LoadingError(_cause_of_death(message)) from None
        of_a_file = isinstance(error, OSError) and error.filename is not None
        few = any(words in str(error) for words in (FAULTS[errno.EMFILE], "ancdata"))
        if few and not of_a_file:
            raise LoadingError(f"{one_line(error)}. {_FEW_FILES}") from None
        raise


_FEW_FILES = (
    "Loading workers need more open files than are allowed: raise ulimit -n, or lower "
    "--num_workers."
)


def _cause_of_death(message: str) -> str:
    sentence = message.strip().splitlines()[0].rstrip(". ")
    if "Killed" in message:
        why = (
            "Something outside this program killed it, mostly for want of memory: lower "
            "--num_workers or free some."
        )
    elif any(w in message for w in ("Bus error", "shared memory", f"exit code {errno.ENOSPC}")):
        why = (
            "Shared memory is full: enlarge /dev/shm (docker: --shm-size), or lower --num_workers."
        )
    elif f"exit code {errno.EMFILE}" in message:
        why = _FEW_FILES
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
