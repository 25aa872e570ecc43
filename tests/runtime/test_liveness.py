"""Processes of a run that end, together or alone, where no connection says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from warm import ranks
from workflow import SMALL, metrics, write_images

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
    lost: int,
    how: bytes | None,
    message: str,
    start: Callable[[int], liveness._Watch],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
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


ENDS_SLOWLY = """
import os, runpy, time
import accelerate

own_end = accelerate.Accelerator.end_training

def slow_end(accelerator):
    time.sleep(5 * int(os.environ["RANK"]))
    own_end(accelerator)

accelerate.Accelerator.end_training = slow_end
runpy.run_path("scripts/pretrain.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "status"), [(4, 0), (10_000, 75)])
def test_a_process_that_ends_slowly_does_not_miss_the_others(
    steps: int, status: int, tmp_path: Path
) -> None:
    script, images = tmp_path / "changed.py", write_images(tmp_path / "images")
    script.write_text(ENDS_SLOWLY)
    flags = [*SMALL, f"--dataset_name={images}", f"--max_steps={steps}", "--save_steps=50"]
    # without a launcher, as under SLURM: the first holds the store of both
    processes = ranks([str(script), *flags, f"--output_dir={tmp_path / 'run'}"], 2)
    until = time.monotonic() + 120
    while status and not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    if status:
        processes[0].send_signal(signal.SIGUSR1)
    for process in processes:
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == status, printed
        assert "error" not in printed
    assert status or metrics(tmp_path / "run")[-1]["step"] == steps
