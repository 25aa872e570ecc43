"""A thread that makes batches ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from vicreg_hf.data.prefetch import AHEAD, Ahead, prefetch

Pair = tuple[torch.Tensor, torch.Tensor]


def pairs(count: int, made: list[int] | None = None) -> Iterator[Pair]:
    for number in range(count):
        if made is not None:
            made.append(number)
        yield torch.tensor(number), torch.tensor(-number)


def ahead(batches: Iterator[Pair]) -> Ahead[Pair]:
    return Ahead(batches, nullcontext, threading.get_ident)


def test_all_batches_come_in_order_from_another_thread() -> None:
    given = list(ahead(pairs(20)))
    assert [int(pair[0]) for pair, _ in given] == list(range(20))
    assert {mark for _, mark in given} != {threading.get_ident()}


def test_no_more_are_made_than_can_wait() -> None:
    made: list[int] = []
    thread = ahead(pairs(100, made))
    next(iter(thread))
    time.sleep(0.3)
    assert 2 <= len(made) <= AHEAD + 2
    thread.stop()


def test_stopping_ends_the_thread() -> None:
    before = threading.active_count()
    thread = ahead(pairs(100))
    next(iter(thread))
    thread.stop()
    assert threading.active_count() == before


def test_an_error_is_raised_where_the_batch_is_asked_for() -> None:
    def failing() -> Iterator[Pair]:
        yield from pairs(3)
        raise OSError("the disk is gone")

    given: list[object] = []
    with pytest.raises(OSError, match="the disk is gone"):
        given.extend(ahead(failing()))
    assert len(given) == 3


def test_on_a_cpu_batches_are_made_when_they_are_asked_for() -> None:
    made: list[int] = []
    batches = prefetch(pairs(5, made), torch.device("cpu"))
    next(batches)
    assert made == [0]
    assert len(list(batches)) == 4
