"""Being asked to stop: finish the step, save, and leave with a code that says so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

STOPPED = 75
"""Exit status of a run that was asked to stop and has saved: EX_TEMPFAIL, start it again."""
REQUESTS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
"""SLURM can send SIGUSR1 some time before it ends a job; the end of a terminal sends SIGHUP."""
LAUNCHER_ENDED = getattr(signal, "SIGUSR2", None)
"""The kernel sends it to a process whose launcher has ended; it is never a second request."""
SAME_REQUEST = 0.5
"""Seconds within which signals are one request: Ctrl-C reaches a process and its launcher,
which passes it on."""
_LAUNCHERS = {
    "accelerate", "accelerate-launch", "torchrun", "torch.distributed.run",
    "torch.distributed.launch", "accelerate.commands.launch", "launch.py", "run.py",
}  # fmt: skip


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and has saved what it had reached."""


class StoppedWaiting(Stopped):
    """The run was asked to stop while it waited for data, and can save what it had reached."""


def handle_requests(handler: Any) -> None:
    """Set a handler of `REQUESTS`, as `signal.signal` takes it, but leave nohup's alone."""
    for number in _not_ignored_by_nohup():
        signal.signal(number, handler)


def stop_before_the_run(*_: object) -> None:
    """A handler for the seconds of a script's imports, when there is nothing to save."""
    say("Stopped before the run began.")
    os._exit(STOPPED)


def _not_ignored_by_nohup() -> list[signal.Signals]:
    nohup = signal.SIG_IGN
    return [n for n in REQUESTS if n.name != "SIGHUP" or signal.getsignal(n) != nohup]


class Signals:
    """While entered, `REQUESTS` ask for a stop; a second one ends the process at once.

    A thread reads the signals, so that it hears a second one during a long operation too. Outside
    the main thread, where Python handles no signals, nothing happens.
    """

    current: ClassVar[Signals | None] = None
    """The one that is entered."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first request."""
        self.settled = False
        """Whether the run has done as asked; further requests then have no effect."""
        self._since = 0.0
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Signals:
        Signals.current = self
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
            self._thread.start()
            heard: list[Any] = _not_ignored_by_nohup()
            heard += [LAUNCHER_ENDED] if _hear_when_launcher_ends() else []
            self._handlers_before = {n: signal.signal(n, _do_nothing) for n in heard}
        return self

    def __exit__(self, *_: object) -> None:
        Signals.current = None
        if self._pipe is None:
            return
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    def _listen(self) -> None:
        assert self._pipe is not None
        while (number := os.read(self._pipe[0], 1)[0]) != 0:
            if number in (*REQUESTS, LAUNCHER_ENDED):
                self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            if os.environ.get("RANK", "0") == "0":
                say(f"{name_of(number)}: finishing the step and saving. Once more ends at once.")
        elif not self.settled and number != LAUNCHER_ENDED and now - self._since > SAME_REQUEST:
            say(f"{number.name}: ended at once; the last checkpoint is untouched.")
            os._exit(128 + number)


def stop_requested() -> bool:
    """Whether the run that is under way, if one is, has been asked to stop."""
    return Signals.current is not None and Signals.current.received is not None


def name_of(number: signal.Signals) -> str:
    """A request in a user's words."""
    return "the end of its launcher" if number == LAUNCHER_ENDED else number.name


def ignore_requests(_worker: int) -> None:
    """In a loading worker: go on loading, since the step in progress needs it.

    Ctrl-C, `timeout` and schedulers signal workers too, and a step may take minutes. A worker ends
    with its parent, which kills it in the end.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, *REQUESTS):
        signal.signal(number, signal.SIG_IGN)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Take the place of the default handler, which would end the process."""


def say(sentence: str) -> None:
    """Print a line to stderr from any thread, whatever Python is doing."""
    with suppress(OSError):
        os.write(2, f"\n{sentence}\n".encode())


def _hear_when_launcher_ends() -> bool:
    """Ask the kernel for a signal then, as accelerate passes none on to a single process.

    Only on Linux, and only under a launcher: a shell may end before the processes it has started.
    """
    if LAUNCHER_ENDED is None or not sys.platform.startswith("linux"):
        return False
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    if not any(Path(os.fsdecode(word)).name in _LAUNCHERS for word in words[:4]):
        return False
    set_parent_death_signal = 1
    library = ctypes.CDLL(None, use_errno=True)
    return library.prctl(set_parent_death_signal, int(LAUNCHER_ENDED), 0, 0, 0) == 0
