"""The order of samples, a function of (seed, step)."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vicreg_hf.data.sampler import GlobalBatches


def test_an_epoch_visits_no_sample_twice_and_drops_the_last_part() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    assert batches.steps_per_epoch == 5
    for epoch in range(3):
        steps = range(5 * epoch, 5 * epoch + 5)
        assert [batches.batch(step)[0] for step in steps] == [epoch] * 5
        rows = np.concatenate([batches.batch(step)[1] for step in steps])
        assert len(np.unique(rows)) == 20
        assert rows.min() >= 0
        assert rows.max() < 22


def test_every_sample_comes_in_some_epoch() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    seen = np.concatenate([batches.batch(step)[1] for step in range(5 * 5)])
    np.testing.assert_array_equal(np.unique(seen), np.arange(22))


@pytest.mark.parametrize("change", ["epoch", "seed"])
def test_epochs_and_seeds_have_their_own_order(change: str) -> None:
    first = GlobalBatches(64, 64, seed=0).batch(0)[1]
    other = (
        GlobalBatches(64, 64, seed=0).batch(1)[1]
        if change == "epoch"
        else GlobalBatches(64, 64, seed=1).batch(0)[1]
    )
    assert (first != other).any()
    np.testing.assert_array_equal(np.sort(first), np.sort(other))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("micro_batch_size", [6, 12, 18])
def test_micro_batches_are_the_same_rows_on_any_number_of_processes(
    world_size: int, micro_batch_size: int
) -> None:
    whole = GlobalBatches(100, 30, seed=3).batch(4)[1]
    parts = [
        GlobalBatches(
            100, 30, seed=3, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size
        ).batch(4)[1]
        for rank in range(world_size)
    ]
    share = micro_batch_size // world_size
    for start, local in zip(range(0, 30, micro_batch_size), range(0, 30, share), strict=False):
        rows = np.concatenate([part[local : local + share] for part in parts])
        np.testing.assert_array_equal(rows, whole[start : start + micro_batch_size])


def test_micro_batches_that_processes_cannot_share_are_refused() -> None:
    message = "got micro_batch_size=5 and num_processes=2; the nearest that does is 4"
    with pytest.raises(ValueError, match=message):
        GlobalBatches(100, 12, seed=0, world_size=2, micro_batch_size=5)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_rows_of_the_ranks_make_the_global_batch(world_size: int) -> None:
    whole = GlobalBatches(100, 12, seed=3)
    parts = [
        GlobalBatches(100, 12, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 7, 8, 100):
        rows = np.concatenate([part.batch(step)[1] for part in parts])
        np.testing.assert_array_equal(rows, whole.batch(step)[1])
        assert {part.batch(step)[0] for part in parts} == {whole.batch(step)[0]}


def test_a_batch_is_a_function_of_its_step_alone() -> None:
    batches = GlobalBatches(22, 4, seed=0)
    forward = [batches.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        for asked in (batches, GlobalBatches(22, 4, seed=0)):
            epoch, rows = asked.batch(step)
            assert epoch == forward[step][0]
            np.testing.assert_array_equal(rows, forward[step][1])


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "message"),
    [
        (10, 16, 1, "got batch_size=16 and 10 images; use at most 10"),
        (100, 18, 4, "got batch_size=18 and num_processes=4; the nearest that does is 16"),
        (100, 19, 4, "got batch_size=19 and num_processes=4; the nearest that does is 20"),
        (100, 4, 4, "got batch_size=4 and num_processes=4; use at least 8"),
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


@pytest.mark.parametrize("batch_size", [8, 4, 6, 16])
def test_fewer_than_two_images_per_process_are_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"at least 2 images per process, got 7 .*processes=4"):
        GlobalBatches(7, batch_size, seed=0, world_size=4)
