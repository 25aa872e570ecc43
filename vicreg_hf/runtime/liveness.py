"""Noticing that a process of the run is gone or stuck, where its connection does not say so.

Each process tells a store every few seconds that it is there. The main one reads what all have
told; the others read whether the main one still is, and whether it has given the run up. A process
that does not finish a step in far more time than steps take ends itself, which the others notice.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from accelerate import Accelerator
from torch.distributed import TCPStore

from vicreg_hf.runtime.distributed import wait_for_all
from vicreg_hf.runtime.signals import Stopped, say

BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without a sign of life after which a process counts as lost."""
STANDSTILL = 1800.0
"""Seconds that a step may take before its process counts as stuck, unless steps take long. It may
wait in it for another process's data, as long as gloo does by default."""
FIRST_STEP = 3600.0
"""Seconds that the first step of a session may take, which may compile the model."""
STEPS_LONG = 20
"""A step may take so many times as long as the longest so far, where that is more."""
LEFT, FAILED = b"left", b"failed"
"""The last sign of a process that ends."""
LOST = 1
"""Exit status where a process of the run is lost."""


class StepTimer:
    """What this process tells of its steps. Only the time within a step has a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step: int | None = None
        self._waited, self._longest = 0.0, 0.0

    def begin(self, step: int) -> None:
        """Say that a step begins, whose data have come."""
        with self._lock:
            self._step, self._waited = step, 0.0

    def end(self) -> None:
        """Say that it is taken."""
        with self._lock:
            self._step, self._longest = None, max(self._longest, self._waited, BEAT)

    def standstill(self, seconds: float) -> str | None:
        """A phrase that says for how long a step has not been taken, if that is too long.

        Args:
            seconds: passed since the last call. They are counted, as a process that is suspended
                stands still by no fault of its own.
        """
        with self._lock:
            if self._step is None:
                return None
            self._waited += seconds
            limit = max(STANDSTILL, STEPS_LONG * self._longest) if self._longest else FIRST_STEP
            if self._waited <= limit:
                return None
            return f"step {self._step} was not finished in {self._waited:.0f} seconds"


@contextmanager
def watched(accelerator: Accelerator, timer: StepTimer | None = None) -> Iterator[None]:
    """End this process, with a message, when it or another one of the run is lost meanwhile.

    For one that fails the others wait no longer than for one that is silent. Where all end well, or
    were asked to stop, they leave together, and the process group is closed.

    Args:
        timer: of this process's steps, which counts as stuck where it says so.
    """
    watch = None
    if accelerator.num_processes > 1 and "MASTER_ADDR" in os.environ:
        watch = _Watch(accelerator.process_index, accelerator.num_processes, timer)
        watch.start()
        wait_for_all()
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
        wait_for_all()
        watch.end()
    accelerator.end_training()


class _Watch(threading.Thread):
    def __init__(self, rank: int, world_size: int, timer: StepTimer | None = None) -> None:
        super().__init__(daemon=True, name="liveness")
        self.rank, self.world_size, self.timer = rank, world_size, timer or StepTimer()
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
            if stuck := self.timer.standstill(BEAT):
                faulthandler.dump_traceback()
                with suppress(RuntimeError):  # the others need not wait for it to fall silent
                    self.store.set(self._key(self.rank), FAILED.decode())
                _end_process(f"process {self.rank} of {self.world_size} is stuck: {stuck}")
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
