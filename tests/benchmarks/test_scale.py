"""The prediction of a step on many GPUs: its counts, its formulas by hand, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from warm import run_script

from vicreg_hf.benchmarks.loss import IN_PLACE_FLOPS, authors_loss, our_loss
from vicreg_hf.benchmarks.scale import Machine, Work, count_work, loss_seconds, predict

WORK = Work(8 * 10**9, 3 * 10**8, parameters=175 * 10**6, norms=55, dim=8192)


def test_a_models_work_is_that_of_its_layers() -> None:
    work = count_work("resnet50", 224, [64, 32])
    assert work.backbone_flops == pytest.approx(2 * 4.09e9, rel=0.01)  # twice He et al.'s MACs
    assert work.expander_flops == 2 * (2048 * 64 + 64 * 32)
    assert work.parameters == 23_508_032 + 2048 * 64 + 64 + 2 * 64 + 64 * 32
    assert (work.norms, work.dim) == (53 + 1, 32)


@pytest.mark.parametrize(("num_rows", "dim"), [(64, 512), (512, 300)])  # Gram, covariance form
def test_arithmetic_of_the_losses_is_what_runs(num_rows: int, dim: int) -> None:
    machine = Machine(loss_tflops=1e-12, authors_loss_tflops=1e-12, loss_share=1.0)
    for loss, authors in ((our_loss, False), (authors_loss, True)):
        inputs = [torch.randn(num_rows, dim).requires_grad_() for _ in range(2)]
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE_FLOPS) as counter:
            torch.autograd.grad(loss(*inputs), inputs)
        flops, _ = loss_seconds(machine, num_rows, dim, 1, authors=authors)
        # ours leaves out the mirrored half of the product, and adds that of a few columns
        assert flops == pytest.approx(counter.get_total_flops(), rel=1e-6 if authors else 0.5)


def test_seconds_of_a_message_worked_by_hand() -> None:
    machine = Machine(nvlink_gb_s=50, infiniband_gb_s=5, nvlink_us=1, infiniband_us=10)
    # 8 GB over 16 GPUs in 2 nodes: 7 GB at 50 GB/s, 0.5 GB at 5 GB/s; trees of depth 3 and 1
    assert machine.gather_seconds(8e9, 16) == pytest.approx(0.14 + 0.1 + 13e-6)
    assert machine.reduce_seconds(8e9, 16) == pytest.approx(2 * (0.24 + 13e-6))


def test_parts_of_a_step_worked_by_hand() -> None:
    machine = Machine(bf16_tflops=100, backbone_share=0.5, expander_share=0.1)
    step = predict(WORK, machine, 1, 256)
    assert step["backbone"] == pytest.approx(256 * 6 * 8e9 / 50e12)
    assert step["expander"] == pytest.approx(256 * 6 * 3e8 / 10e12)
    assert step["communication"] == 0
    assert step["step"] == pytest.approx(sum(step[name] for name in list(step)[:5]))
    slow = replace(machine, input_images_s=100.0)
    assert predict(WORK, slow, 1, 256)["step"] == pytest.approx(256 * 8 / 100)
    least = replace(machine, backbone_least_ms=1e6)
    assert predict(WORK, least, 1, 256)["backbone"] == 1000


@pytest.mark.parametrize(
    ("world", "batch_size", "said"), [(8, 2044, "the nearest is 2048"), (12, 96, "use 16")]
)
def test_batches_and_nodes_that_cannot_be(world: int, batch_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        predict(WORK, Machine(), world, batch_size)


def test_the_table_says_what_it_assumes_and_what_was_given() -> None:
    result = run_script(
        "scripts/benchmark.py", "scale", "--architecture=test_resnet", "--image_size=32",
        "--batch_size=64", "--expander_dims=16", "--gpus", "4", "8", "--weak", "--bf16_tflops=312",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert "Predicted, not measured" in text
    assert "| bf16_tflops | 312.0 | TFLOP/s, peak | given |" in text
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line[:3] in ("| 4", "| 8")]
    assert [row[:2] for row in rows] == [["4", "16"], ["8", "16"]]
