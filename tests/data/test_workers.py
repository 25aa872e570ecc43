"""Batches made ahead, by loading workers and by a thread, and how both end."""

from __future__ import annotations

import multiprocessing
import os
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


def test_a_worker_that_is_killed_is_said_to_have_died() -> None:
    # torch's signal handler raises wherever the main process is: also between two batches
    with (
        pytest.raises(LoadingError, match=r"worker died: .*Killed.*lower --num_workers"),
        loading_errors(),
        loading(range(6), _die_at_2, 1, item_bytes=lambda: 8) as items,
    ):
        list(items)


def test_a_lost_connection_is_told_with_what_the_worker_died_of() -> None:
    def lose_the_worker() -> None:
        with loading_errors(), loading(range(6), int, 1, item_bytes=lambda: 8) as items:
            next(items)
            (worker,) = items._workers  # type: ignore[attr-defined]
            worker.kill()
            raise EOFError

    with pytest.raises(LoadingError, match=r"worker died: .*Killed.*lower --num_workers"):
        lose_the_worker()


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


# --- the thread


def counting(made: list[int], until: int = 100) -> Callable[[], tuple[int, int] | None]:
    numbers = count()

    def make() -> tuple[int, int] | None:
        made.append(next(numbers))
        return (made[-1], threading.get_ident()) if made[-1] < until else None

    return make


def test_all_batches_come_in_order_from_another_thread() -> None:
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
