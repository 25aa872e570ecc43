"""Noticing that a process of the run is gone or stuck, where its connection does not say so.

Each process tells a store every few seconds that it is there. The main one reads what all have
told; the others read whether the main one still is, and whether it has given the run up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from accelerate import Accelerator
from torch.distributed import TCPStore

from vicreg_hf.runtime.signals import Stopped, say

BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without a sign of life after which a process counts as lost."""
LEFT, FAILED = b"left", b"failed"
"""The last sign of a process that ends."""
LOST = 1
"""Exit status where a process of the run is lost."""


@contextmanager
def watched(accelerator: Accelerator) -> Iterator[None]:
    """End this process, with a message, when another one of the run is lost meanwhile.

    For one that fails the others wait no longer than for one that is silent. Where all end well, or
    were asked to stop, they leave together, and the process group is closed.
    """
    watch = None
    if accelerator.num_processes > 1 and "MASTER_ADDR" in os.environ:
        watch = _Watch(accelerator.process_index, accelerator.num_processes)
        watch.start()
        accelerator.wait_for_everyone()
    try:
        yield
    except Stopped:
        _leave_together(accelerator, watch)
        raise
    except BaseException:
        if watch is not None:
            watch.leave(FAILED)
        raise
    _leave_together(accelerator, watch)


def _leave_together(accelerator: Accelerator, watch: _Watch | None) -> None:
    """Wait until all are through: the store may be the main process's, and end with it."""
    if watch is not None:
        if not accelerator.is_main_process:
            watch.leave(LEFT)
        accelerator.wait_for_everyone()
        watch.end()
    accelerator.end_training()


class _Watch(threading.Thread):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(daemon=True, name="liveness")
        self.rank, self.world_size = rank, world_size
        # a connection of its own: torch's waits while a collective begins
        self.store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
            is_master=False, timeout=timedelta(seconds=SILENCE),
        )  # fmt: skip
        self.left = threading.Event()
        self.signs: dict[int, tuple[bytes, float]] = {}
        """The last sign of each process that is watched, and when it came."""
        self.store.set(self._key(rank), "0")

    def _key(self, rank: int) -> str:
        # a restart by torchrun keeps its store
        return f"vicreg_hf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"

    def run(self) -> None:
        beats = 0
        while not self.left.wait(BEAT):
            beats += 1
            try:
                self.store.set(self._key(self.rank), str(beats))
                lost = self._find_lost()
            except RuntimeError as error:
                if not self.left.is_set():
                    _end_process(f"the main process cannot be reached ({str(error)[:100]})")
                return
            if lost is not None:
                failed = self.signs[lost][0] == FAILED
                silent = f"gave no sign of life for {SILENCE:g} seconds"
                how = "has failed, as its own message says" if failed else silent
                _end_process(f"process {lost} of {self.world_size} {how}")

    def _find_lost(self) -> int | None:
        now = time.monotonic()
        ranks = range(1, self.world_size) if self.rank == 0 else range(1)
        signs = self.store.multi_get([self._key(rank) for rank in ranks])
        for rank, sign in zip(ranks, signs, strict=True):
            if sign == LEFT or self.signs.get(rank, (b"", 0))[0] != sign:
                self.signs[rank] = (sign, now)
        return next((rank for rank in ranks if now - self.signs[rank][1] > SILENCE), None)

    def leave(self, how: bytes) -> None:
        """Tell the others, which do not wait for this process any more, and watch no one."""
        self.end()
        with suppress(RuntimeError):  # the main process has ended, which the others will notice
            self.store.set(self._key(self.rank), how.decode())

    def end(self) -> None:
        self.left.set()
        self.join()


def _end_process(reason: str) -> None:
    say(f"error: {reason}; the run ends. Start it again to go on from its last checkpoint.")
    os._exit(LOST)
