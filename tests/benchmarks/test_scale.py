"""The prediction: its counts against what runs, its formulas against values by hand, its limits."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from gloo import GlooPool
from workflow import run

from vicreg_hf.benchmarks.loss import _IN_PLACE, authors_loss, embeddings, our_loss
from vicreg_hf.benchmarks.scale import checkpoint_bytes, predict
from vicreg_hf.benchmarks.scale_counts import (
    Count,
    LossWork,
    Work,
    authors_loss_work,
    count,
    count_work,
    our_loss_work,
)
from vicreg_hf.benchmarks.scale_machine import Machine
from vicreg_hf.loss.covariance import STRIPE_ROWS
from vicreg_hf.runtime.distributed import world_size

CPU = torch.device("cpu")
STRIPE = STRIPE_ROWS["cpu"]
LOSSES = {"ours": (our_loss, our_loss_work), "authors": (authors_loss, authors_loss_work)}
SHAPES = [(64, 512), (128, 1024), (256, 128), (512, 300)]  # Gram form twice, covariance form twice
WORK = Work(
    backbone_flops=8 * 10**9, backbone_kernels=200, expander_flops=3 * 10**8, expander_kernels=8,
    expander_weights=150 * 10**6, parameters=175 * 10**6, norms=55, optimizer_kernels=1000,
    optimizer_traffic=10**10, dim=8192,
)  # fmt: skip
DGX = Machine()


# What is counted


def _count_loss(name: str, num_rows: int, dim: int) -> Count:
    inputs = embeddings(num_rows // world_size(), dim, CPU, torch.float32)
    loss = LOSSES[name][0]
    return count(lambda: torch.autograd.grad(loss(*inputs), inputs), _IN_PLACE)


def _formula(name: str, num_rows: int, dim: int, world: int) -> LossWork:
    more: dict[str, Any] = {"stripe": STRIPE} if name == "ours" else {}
    return LOSSES[name][1](num_rows, dim, world, **more)


@pytest.mark.parametrize(("num_rows", "dim"), SHAPES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", [1, 2])
def test_formulas_of_a_loss_agree_with_what_runs(
    gloo: GlooPool, name: str, num_rows: int, dim: int, world: int
) -> None:
    for counted in gloo.run(world, _count_loss, name, num_rows, dim):
        expected = _formula(name, num_rows, dim, world)
        assert counted.flops == expected.flops
        assert counted.traffic == pytest.approx(expected.traffic, rel=0.15)


def test_the_authors_form_costs_as_many_times_ours_as_the_loss_benchmark_counts() -> None:
    num_rows, dim = 2048, 8192
    theirs = _formula("authors", num_rows, dim, 1).flops
    counted = {}
    for name, device in {"ours": CPU, "authors": torch.device("meta")}.items():
        inputs = [torch.randn(num_rows, dim, device=device).requires_grad_() for _ in range(2)]
        loss = LOSSES[name][0]
        backward = lambda loss=loss, inputs=inputs: torch.autograd.grad(loss(*inputs), inputs)  # noqa: E731
        counted[name] = count(backward, _IN_PLACE).flops
    expected = counted["authors"] / counted["ours"]
    assert theirs / _formula("ours", num_rows, dim, 1).flops == pytest.approx(expected)
    assert expected == pytest.approx(6 * dim / (2 * (9 / 16) * num_rows + 2 * num_rows), rel=0.01)


def test_a_models_work_is_that_of_its_layers() -> None:
    work = count_work("resnet50", 224, [64, 32])
    assert work.backbone_flops == pytest.approx(2 * 4.09e9, rel=0.01)  # twice He et al.'s MACs
    assert work.expander_flops == 2 * (2048 * 64 + 64 * 32)
    assert work.expander_weights == 2048 * 64 + 64 + 2 * 64 + 64 * 32  # bias, scale and shift
    assert work.parameters == 23_508_032 + work.expander_weights
    assert work.norms == 53 + 1
    assert work.dim == 32
    assert work.backbone_kernels >= 53 * 2 + 49  # convolutions, normalisations, activations
    assert checkpoint_bytes(work) == 8 * work.parameters


# Formulas by hand


@pytest.mark.parametrize(("world", "ours", "authors"), [(1, 0, 0), (2, 2, 6), (4, 3, 9)])
def test_bytes_sent_are_those_that_the_readme_has_measured(
    world: int, ours: float, authors: float
) -> None:
    """MiB a process, for float32 embeddings of (256, 2048)."""
    for formula, expected in ((our_loss_work, ours), (authors_loss_work, authors)):
        loss = formula(256, 2048, world, embedding_bytes=4)
        sent = sum(sum(DGX.gather_bytes(size, world)) for size in loss.gathers)
        sent += sum(2 * sum(DGX.gather_bytes(size, world)) for size in loss.reductions)
        assert sent == expected * 2**20


def test_a_hierarchical_gather_sends_what_one_ring_would() -> None:
    for world in (1, 2, 8, 32, 1024):
        nvlink, infiniband = DGX.gather_bytes(1000.0, world)
        assert nvlink + infiniband == pytest.approx(1000 * (world - 1) / world)
        assert (infiniband > 0) == (world > 8)
    # 32 GPUs in 4 nodes: 7/8 within the node; of a GPU's eighth 3/4 come from other nodes
    assert DGX.gather_bytes(1000.0, 32) == (875.0, 93.75)


def test_seconds_of_a_message_worked_by_hand() -> None:
    machine = Machine(nvlink_gb_s=100, infiniband_gb_s=10, link_share=0.5, nvlink_us=1,
                      infiniband_us=10)  # fmt: skip
    # 8 GB over 16 GPUs: 7 GB at 50 GB/s and 0.5 GB at 5 GB/s; 7 and 1 messages
    assert machine.gather_seconds(8e9, 16) == pytest.approx(0.14 + 0.1 + 17e-6)
    # twice as much, with trees of depth 3 and 1
    assert machine.reduce_seconds(8e9, 16) == pytest.approx(2 * (0.24 + 13e-6))


def test_a_covariance_matrix_is_reduced_where_there_are_more_rows_than_dimensions() -> None:
    loss = our_loss_work(4096, 512, 8)
    assert loss.gathers == ()
    assert loss.reductions == (4 * 512, 4 * 512**2) * 2


def test_arithmetic_of_a_step_worked_by_hand() -> None:
    machine = Machine(bf16_tflops=100, backbone_share=0.5, expander_share=0.1, launch_us=0)
    step = predict(WORK, machine, 4, 1024)
    assert step.backbone == pytest.approx(256 * 2 * 3 * 8e9 / 50e12)
    assert step.expander == pytest.approx(256 * 2 * 3 * 3e8 / 10e12)
    assert step.optimizer == pytest.approx(1e10 / (0.7 * 3350e9))


def test_input_is_the_slower_of_decoding_and_reading() -> None:
    machine = Machine(cores_per_node=10, crop_images_s=100, read_mb_s=50, image_kb=100)
    assert machine.input_rate(8) == 500  # 50 MB/s of 0.1 MB
    assert replace(machine, read_mb_s=1000).input_rate(16) == 2000  # 2 nodes of 10 cores
    assert replace(machine, read_mb_s=1000).input_rate(1) == 125  # an eighth of a node


# Limits


def test_one_gpu_has_nothing_to_communicate() -> None:
    for formula in ("ours", "authors"):
        assert predict(WORK, DGX, 1, 2048, formula=formula).communication == 0


def test_the_gram_form_falls_with_the_number_of_processes_and_the_authors_form_does_not() -> None:
    arithmetic = [our_loss_work(2048, 8192, world).flops for world in (2, 4, 8)]
    for before, after in itertools.pairwise(arithmetic):
        assert after / before == pytest.approx(1 / 2, rel=0.02)
    assert len({authors_loss_work(2048, 8192, world).flops for world in (1, 8, 1024)}) == 1


def test_more_gpus_compute_less_and_wait_more() -> None:
    steps = [predict(WORK, DGX, world, 2048) for world in (1, 8, 32, 128, 512, 1024)]
    for before, after in itertools.pairwise(steps):
        assert after.backbone <= before.backbone
        assert after.expander <= before.expander
        assert after.loss < before.loss
        assert after.input < before.input
        assert after.communication > before.communication


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"bf16_tflops": 100.0}, "backbone"), ({"expander_share": 0.1}, "expander"),
        ({"loss_tflops": 10.0}, "loss"), ({"memory_gb_s": 500.0}, "optimizer"),
        ({"nvlink_gb_s": 10.0}, "communication"), ({"infiniband_us": 50.0}, "communication"),
        ({"overlap": False}, "communication"), ({"crop_images_s": 10.0}, "input"),
        ({"checkpoint_mb_s": 1.0}, "checkpoint"),
    ],
)  # fmt: skip
def test_a_worse_machine_takes_longer(change: dict[str, Any], part: str) -> None:
    usual, worse = (predict(WORK, machine, 32, 2048) for machine in (DGX, replace(DGX, **change)))
    assert getattr(worse, part) > getattr(usual, part)


def test_a_step_waits_for_its_slowest_part() -> None:
    slow_input = predict(WORK, replace(DGX, crop_images_s=1.0), 8, 2048)
    assert slow_input.bound == "input"
    assert slow_input.seconds == slow_input.input
    assert predict(WORK, DGX, 1, 2048).bound == "backbone"
    assert predict(WORK, replace(DGX, launch_us=500.0), 8, 64).bound == "kernel launches"
    together = replace(slow_input, input_meanwhile=False)
    assert together.seconds > slow_input.seconds


def test_a_checkpoint_is_waited_for_beyond_a_tenth_of_the_steps_between_two() -> None:
    slow = replace(DGX, checkpoint_mb_s=1.0)
    step, free = predict(WORK, slow, 8, 2048), predict(WORK, DGX, 8, 2048)
    assert free.checkpoint == 0
    waited = checkpoint_bytes(WORK) / 1e6 - 100 * free.seconds
    assert step.checkpoint == pytest.approx(waited / 1000)


@pytest.mark.parametrize(
    ("world", "batch_size", "message"),
    [(12, 2400, "use 16"), (3, 16, "nearest is 15"), (8, 8, "nearest is 16")],
)
def test_what_cannot_be_shared_evenly_is_refused(world: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(WORK, DGX, world, batch_size)


# The command


def tables(*flags: str) -> list[list[dict[str, str]]]:
    """Each table that is printed: its rows, by the names of the columns that have one."""
    result = run([sys.executable, "scripts/benchmark.py", "scale", *flags])
    assert result.returncode == 0, result.stderr
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", result.stdout, flags=re.MULTILINE):
        header, _, *rows = [line[2:-2].split(" | ") for line in block.splitlines()]
        found.append([dict(reversed([*zip(header, row, strict=True)])) for row in rows])
    return found


def test_a_table_and_the_assumptions_are_printed() -> None:
    small = ["--architecture=test_resnet", "--image_size=32", "--expander_dims=64-64"]
    prediction, assumed = tables(*small, "--batch_size=64", "--gpus", "1", "16", "--nvlink_us=7")
    assert [row["GPUs"] for row in prediction] == ["1", "16"]
    assert [row["images each"] for row in prediction] == ["64", "4"]
    assert prediction[0]["efficiency"] == "100.0 %"
    for row in prediction:
        seconds = float(row["images each"]) * int(row["GPUs"]) / float(row["images/s"])
        hours = 1_281_167 * 100 / float(row["images/s"]) / 3600
        assert float(row["h for 100 epochs"]) == pytest.approx(hours, abs=0.01)
        assert 1000 * seconds > float(row["input"]) - 0.01
    values = {row[""]: (row["value"], row["source"]) for row in assumed}
    assert values["nvlink_us"] == ("7.0", "given")
    assert values["infiniband_us"] == ("5.0", "assumed")


def test_weak_scaling_keeps_the_images_of_each_gpu() -> None:
    small = ["--architecture=test_resnet", "--image_size=32", "--expander_dims=64-64"]
    prediction, _ = tables(*small, "--batch_size=64", "--gpus", "2", "16", "--weak")
    assert [row["images each"] for row in prediction] == ["32", "32"]


def test_processes_are_predicted_and_measured() -> None:
    small = ["--batch_size=16", "--expander_dims=16-32", "--steps=2"]
    ((one, two),) = tables("--check", "1", "2", *small)
    assert (one["processes"], two["processes"]) == ("1", "2")
    assert float(one["communication"]) == 0 < float(two["communication"])
    for row in (one, two):
        parts = ("backbone", "expander", "loss", "optimizer", "communication", "views")
        predicted = sum(float(row[part]) for part in parts)
        assert float(row["predicted ms"]) == pytest.approx(predicted, abs=0.4)
        ratio = float(row["predicted ms"]) / float(row["measured ms"])
        assert float(row["predicted / measured"]) == pytest.approx(ratio, abs=0.02)


def test_listing_and_ordering_are_measured_and_scaled() -> None:
    result = run([sys.executable, "scripts/benchmark.py", "scale", "--billion",
                  "--num_files=1500", "--num_rows=20000"])  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line[2:-2].split(" | ") for line in result.stdout.splitlines() if line[:2] == "| "]
    assert [line[1] for line in lines[2:]] == ["1,500", "1,500", "20,000"]
    assert "an Arrow table of 2,000 rows" in result.stdout
