"""The order of samples, a function of (seed, step)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from vicreg_hf.data.sampler import GlobalBatches


def test_an_epoch_visits_no_sample_twice_and_drops_the_last_part() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    assert batches.steps_per_epoch == 5
    epochs = []
    for epoch in range(5):
        steps = range(5 * epoch, 5 * epoch + 5)
        assert [batches.batch(step)[0] for step in steps] == [epoch] * 5
        epochs.append(np.concatenate([batches.batch(step)[1] for step in steps]))
        assert len(np.unique(epochs[-1])) == 20
    np.testing.assert_array_equal(np.unique(epochs), np.arange(22))  # every one in some epoch


def test_epochs_and_seeds_have_their_own_order() -> None:
    first = GlobalBatches(64, 64, seed=0).batch(0)[1]
    for seed, step in ((0, 1), (1, 0)):
        other = GlobalBatches(64, 64, seed=seed).batch(step)[1]
        assert (first != other).any()
        np.testing.assert_array_equal(np.sort(first), np.sort(other))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("micro_batch_size", [6, 12, 18, None])
def test_micro_batches_are_the_same_rows_on_any_number_of_processes(
    world_size: int, micro_batch_size: int | None
) -> None:
    size = micro_batch_size or 30
    share = size // world_size
    split: Any = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    ranks = [GlobalBatches(100, 30, seed=3, rank=rank, **split) for rank in range(world_size)]
    for step in (0, 2, 3, 4, 100):
        epoch, whole = GlobalBatches(100, 30, seed=3).batch(step)
        parts = [rank.batch(step) for rank in ranks]
        assert {part[0] for part in parts} == {epoch}
        for start, local in zip(range(0, 30, size), range(0, 30, share), strict=False):
            rows = np.concatenate([part[local : local + share] for _, part in parts])
            np.testing.assert_array_equal(rows, whole[start : start + size])


def test_a_batch_is_a_function_of_its_step_alone() -> None:
    forward = [GlobalBatches(22, 4, seed=0).batch(step) for step in range(30)]
    batches = GlobalBatches(22, 4, seed=0)
    for step in reversed(range(30)):
        epoch, rows = batches.batch(step)
        assert epoch == forward[step][0]
        np.testing.assert_array_equal(rows, forward[step][1])


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "message"),
    [
        (10, 16, 1, "got batch_size=16 and 10 images; use at most 10"),
        (100, 18, 4, "got batch_size=18 and num_processes=4; the nearest that does is 16"),
        (100, 19, 4, "got batch_size=19 and num_processes=4; the nearest that does is 20"),
        (100, 3, 4, "got batch_size=3 and num_processes=4; .* 8"),
        (11, 11, 4, "got batch_size=11 and num_processes=4; the nearest that does is 8"),
        (10, 16, 4, "got batch_size=16 and 10 images; use at most 8"),
    ],
)
def test_an_impossible_batch_is_answered_with_the_nearest_possible(
    num_samples: int, batch_size: int, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GlobalBatches(num_samples, batch_size, seed=0, world_size=world_size)
    offered = int(re.findall(r"\d+", str(error.value))[-1])
    assert GlobalBatches(num_samples, offered, seed=0, world_size=world_size).steps_per_epoch >= 1


def test_what_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 images per process, got 7 .*processes=4"):
        GlobalBatches(7, 8, seed=0, world_size=4)
    message = "got micro_batch_size=5 and num_processes=2; the nearest that does is 4"
    with pytest.raises(ValueError, match=message):
        GlobalBatches(100, 12, seed=0, world_size=2, micro_batch_size=5)
