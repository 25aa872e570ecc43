"""Processes of a run that end, together or alone, where no connection says so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from warm import run_script

from vicreg_hf.runtime import liveness


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], liveness._Watch]:
    """Starts the watch of one of two processes, which this one stands for."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(liveness, "BEAT", 0.05)
    monkeypatch.setattr(liveness, "SILENCE", 1.0)

    def begin(rank: int) -> liveness._Watch:
        watch = liveness._Watch(rank, 2)
        watch.start()
        return watch

    begin.store = store  # type: ignore[attr-defined] # it lives as long as the fixture
    return begin


@pytest.mark.parametrize(
    ("lost", "how", "message"),
    [
        (1, liveness.FAILED, "process 1 of 2 has failed, as its own message says; the run ends"),
        (1, None, "process 1 of 2 gave no sign of life for 1 seconds; the run ends"),
        (0, None, "process 0 of 2 gave no sign of life for 1 seconds; the run ends"),
        (1, liveness.LEFT, ""),
    ],
)
def test_a_process_ends_when_another_is_lost_and_not_when_it_leaves(
    lost: int, how: bytes | None, message: str, start: Callable[[int], liveness._Watch],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    own, other = start(1 - lost), start(lost)
    time.sleep(0.3)
    assert not ended
    if how is None:
        other.end()  # it says nothing more
    else:
        other.leave(how)
    until = time.monotonic() + (2.0 if how == liveness.LEFT else 20.0)
    while not ended and time.monotonic() < until:
        time.sleep(0.05)
    own.end()
    assert ended[:1] == ([liveness.LOST] if message else [])
    assert message in capfd.readouterr().err


def test_a_process_that_does_not_finish_a_step_ends_and_the_others_hear_of_it(
    start: Callable[[int], liveness._Watch], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(liveness, "STANDSTILL", 0.3)
    monkeypatch.setattr(liveness, "STEPS_LONG", 2)
    stuck, other = start(1), start(0)
    stuck.timer.begin(1)
    time.sleep(0.6)  # the first step of a session may compile
    stuck.timer.end()
    time.sleep(0.6)  # time between steps has no limit
    assert not ended
    stuck.timer.begin(2)
    until = time.monotonic() + 20
    while len(ended) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    stuck.end()
    other.end()
    said = capfd.readouterr().err
    assert "process 1 of 2 is stuck: step 2 was not finished in " in said
    assert "process 1 of 2 has failed" in said
    assert "test_liveness.py" in said  # where it stands


ENDS_SLOWLY = """
import time
from accelerate import Accelerator
from vicreg_hf.runtime import liveness
liveness.BEAT, liveness.SILENCE = 0.05, 0.6
accelerator = Accelerator()
with liveness.watched(accelerator):
    time.sleep(1.2 * accelerator.process_index)
time.sleep(1.2 * accelerator.process_index)
"""


def test_processes_that_end_at_their_own_pace_do_not_miss_each_other(tmp_path: Path) -> None:
    # without a launcher: the first, which is through at once, holds the store of both
    (tmp_path / "slow.py").write_text(ENDS_SLOWLY)
    done = run_script(str(tmp_path / "slow.py"), processes=2)
    assert (done.returncode, done.stderr) == (0, "")
