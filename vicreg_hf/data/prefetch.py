"""Making the next batch while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils._pytree import tree_leaves

T = TypeVar("T", bound=tuple[Any, ...])
AHEAD = 1
"""Batches that wait to be used, beside the one in use and the one that is being made."""


def prefetch(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Pass batches on; on a GPU a thread makes them ahead, on a stream of its own.

    On a CPU the cores have enough to do with the present batch.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    thread = Ahead(batches, lambda: _on(stream), stream.record_event)
    try:
        for batch, made in thread:
            current = torch.cuda.current_stream(device)
            current.wait_event(made)
            for tensor in tree_leaves(batch):
                tensor.record_stream(current)  # its memory may not be reused before
            yield batch
    finally:
        thread.stop()


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    # a new thread's device is the first, on which going back to it would begin to use memory
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield


class Ahead(Generic[T]):
    """Iterate in a thread.

    Args:
        batches: what to iterate over.
        context: what the thread does it in.
        mark: called after each batch; its answer comes with the batch.
    """

    def __init__(
        self,
        batches: Iterator[T],
        context: Callable[[], AbstractContextManager[Any]],
        mark: Callable[[], Any],
    ) -> None:
        self._batches, self._context, self._mark = batches, context, mark
        self._made: queue.Queue[tuple[T | None, Any]] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")
        self._thread.start()

    def _work(self) -> None:
        try:
            with self._context():
                for batch in self._batches:
                    if not self._put((batch, self._mark())):
                        return
        except BaseException as error:  # raised again where the batch is asked for
            self._error = error
        self._put((None, None))

    def _put(self, item: tuple[T | None, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[tuple[T, Any]]:
        while True:
            batch, mark = self._made.get()
            if batch is None:
                if self._error is not None:
                    raise self._error
                return
            yield batch, mark

    def stop(self) -> None:
        """Let the thread end after the batch it is making."""
        self._stopped.set()
        self._thread.join()
