"""Batches made ahead, by loading workers and by a thread, and how both end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import photographs, split_of

from vicreg_hf.data import workers
from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.workers import (
    AHEAD,
    LoadingError,
    batches_ahead,
    loading,
    loading_errors,
    made_ahead,
    prefetch,
)
from vicreg_hf.runtime.machine import default_num_workers
from vicreg_hf.runtime.signals import Signals, StoppedWaiting


@pytest.mark.parametrize(
    ("num_images", "image_sizes", "num_workers", "expected"),
    [
        (512, [224, 224], 15, 1),  # imagenet-r50-100ep on one GPU: 154 MB * 15 > 2 GiB
        (512, [224, 224], 4, 3),  # 154 MB * 4 * 3 < 2 GiB
        (64, [224, 224], 15, 4),  # its share of eight
        (512, [224, 224] + [96] * 6, 8, 1),  # 239 MB * 8 * 2 > 2 GiB
        (10**6, [224], 1, 1),
    ],
)
def test_large_batches_are_made_fewer_ahead(
    num_images: int, image_sizes: list[int], num_workers: int, expected: int
) -> None:
    batch_bytes = num_images * 3 * sum(side**2 for side in image_sizes)
    assert batches_ahead(batch_bytes, num_workers) == expected


def test_every_process_gets_a_reasonable_number_of_workers() -> None:
    assert all(1 <= default_num_workers(processes) <= 16 for processes in (1, 2, 10_000))


# --- workers that die, and that must not


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_connection_that_breaks_is_a_worker_that_died(error: Exception) -> None:
    """What torch raises of a worker that is killed while it passes a batch on."""
    sentence = r"worker died: the connection .*--num_workers 0"
    with pytest.raises(LoadingError, match=sentence), loading_errors():
        raise error


def _die_at_2(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _time_out_at_1(item: int) -> int:
    if item == 1:
        raise RuntimeError("the read operation timed out")
    return item


def test_a_worker_whose_own_reading_times_out_loses_no_batch() -> None:
    with (
        pytest.raises(RuntimeError, match="read operation timed out"),
        loading(range(3), _time_out_at_1, 1, item_bytes=lambda: 8) as items,
    ):
        list(items)


def test_a_worker_that_is_killed_is_said_to_have_died() -> None:
    # torch's signal handler raises wherever the main process is: also between two batches
    with (
        pytest.raises(LoadingError, match=r"worker died: .*Killed.*lower --num_workers"),
        loading_errors(),
        loading(range(6), _die_at_2, 1, item_bytes=lambda: 8) as items,
    ):
        list(items)


def test_a_worker_goes_on_when_its_process_group_is_told_to_end() -> None:
    """As by `timeout`, and by schedulers; it ends with what needs it, and at once."""
    others = set(multiprocessing.active_children())  # of earlier tests
    split = split_of(photographs(20))
    batches = evaluation_batches(split, np.arange(20), 24, batch_size=2, num_workers=1)
    made = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - others
    status = Path(f"/proc/{worker.pid}/status").read_text()
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        assert ignored >> (number - 1) & 1
        os.kill(worker.pid or 0, number)
    assert len([*made, *batches]) == 10
    assert not worker.is_alive()


def tensor_of(item: int) -> torch.Tensor:
    return torch.full((1000,), item)


def test_batches_that_shared_memory_has_no_room_for_come_through_pipes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [batches_ahead(100, 2, room) for room in (399, 400, 799, 800)] == [0, 1, 2, 3]
    free = shutil.disk_usage(workers.SHARED_MEMORY).free
    with loading(range(3), tensor_of, 1, item_bytes=lambda: free) as items:
        assert [int(item[-1]) for item in items] == [0, 1, 2]
    assert "come through pipes" in capsys.readouterr().err


class Unsendable:
    """What cannot leave a worker, as where shared memory or open files are used up."""

    def __init__(self, fault: int) -> None:
        self.fault = fault

    def __reduce__(self) -> Any:
        raise OSError(self.fault, os.strerror(self.fault))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [(errno.ENOSPC, "--shm-size"), (errno.EMFILE, "raise ulimit -n"), (errno.EIO, "worker died")],
)
def test_a_worker_that_cannot_pass_a_batch_on_ends(fault: int, sentence: str) -> None:
    with (
        pytest.raises(LoadingError, match=sentence),
        loading_errors(),
        loading([fault], Unsendable, 1, item_bytes=lambda: 8) as items,
    ):
        list(items)


def test_a_worker_that_is_stuck_is_told_of_and_does_not_keep_a_run_from_stopping(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "WAITING", 1)
    monkeypatch.setattr(workers, "SILENCE", 1)
    threading.Timer(2.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with (
        Signals(),
        pytest.raises(StoppedWaiting),
        loading([60.0], time.sleep, 1, item_bytes=lambda: 8) as items,
    ):
        next(items)
    assert (
        "warning: no batch has come from the loading workers for 1 sec" in capsys.readouterr().err
    )


# --- the thread


def counting(made: list[int], until: int = 100) -> Callable[[], tuple[int, int] | None]:
    numbers = count()

    def make() -> tuple[int, int] | None:
        made.append(next(numbers))
        return (made[-1], threading.get_ident()) if made[-1] < until else None

    return make


def test_batches_come_in_order_from_another_thread() -> None:
    numbers, threads = zip(*made_ahead(counting([], 20)), strict=True)
    assert list(numbers) == list(range(20))
    assert set(threads) != {threading.get_ident()}


def test_no_more_are_made_than_may_wait_and_the_thread_ends() -> None:
    before = threading.active_count()
    made: list[int] = []
    ahead: Any = made_ahead(counting(made))
    next(ahead)
    time.sleep(0.3)
    assert len(made) == AHEAD + 1
    ahead.close()
    assert threading.active_count() == before
    assert len(made) == AHEAD + 1


def test_an_error_is_raised_where_the_batch_is_taken() -> None:
    def failing(numbers: Any = count()) -> int:  # noqa: B008
        if (number := next(numbers)) == 3:
            raise OSError("the disk is gone")
        return number

    taken: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        taken.extend(made_ahead(failing))
    assert taken == [0, 1, 2]


def test_on_a_cpu_batches_are_made_when_they_are_taken() -> None:
    made: list[int] = []
    batches = prefetch((made.append(number) for number in range(5)), torch.device("cpu"))
    next(batches)
    assert made == [0]
