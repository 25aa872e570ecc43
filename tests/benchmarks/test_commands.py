"""What the benchmark's commands print, and that they compare equal things."""

from __future__ import annotations

import copy
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gloo import GlooPool
from torch import Tensor
from warm import run_script
from workflow import SMALL, write_images

from vicreg_hf.benchmarks.commands import measure
from vicreg_hf.benchmarks.contenders import plain_step
from vicreg_hf.benchmarks.loss import authors_loss, losses
from vicreg_hf.benchmarks.measuring import MIB, memory_process, peak_extra_mib
from vicreg_hf.benchmarks.train import NAMES
from vicreg_hf.loss.vicreg import vicreg_loss
from vicreg_hf.models.expander import expander
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.training.building.optimizers import LARS

CPU = torch.device("cpu")
DIMS = [4, 24]  # fewer dimensions than rows, and more
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux records it")


def table(text: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table with which a text ends."""
    cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, rule, *rows = cells
    assert rule == ["---"] * len(header)
    assert all(len(row) == len(header) for row in rows)
    return header, rows


def measured(name: str, *words: str) -> tuple[str, list[str], list[list[str]]]:
    """What a command prints, and the header and the rows of its table."""
    text = measure([name, *words])
    return text, *table(text)


def share(cell: str) -> float:
    return float(cell.removesuffix(" %"))


SMALLEST = ["--architecture=test_resnet", "--batch_size=8"]


def test_extraction_is_measured_against_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vicreg_hf.benchmarks.features.default_num_workers", lambda _: 0)
    text, header, rows = measured("features", *SMALLEST, "--num_images=24", "--side=32")
    ((name, images, bare, whole, part),) = rows
    assert "commit" in text
    assert header[2:4] == ["forward alone, images/s", "extraction, images/s"]
    assert (name, images) == ("test_resnet at 32 px", "24")
    assert share(part) == pytest.approx(100 * float(whole) / float(bare), rel=0.2, abs=2)


def test_saving_is_measured_in_the_background_and_in_the_foreground() -> None:
    text, _, rows = measured("checkpoint", *SMALLEST, "--image_size=32", "--expander_dims=8-8")
    step = float(re.search(r"([\d.]+) s a step", text)[1])  # pyright: ignore[reportOptionalSubscript]
    assert [row[0] for row in rows] == ["in the foreground", "in the background"]
    for _, cost, part in rows:
        expected = 100 * float(cost) / (float(cost) + 500 * step)
        assert share(part) == pytest.approx(expected, abs=1)


def test_one_process_prints_a_line_for_every_pair_of_rows_and_dimensions() -> None:
    text, header, rows = measured("loss", "--rows", "16", "--dims", "8", "24")
    assert re.search(rf"\d+ threads.*torch {re.escape(torch.__version__)}.*commit", text)
    ratios = [f"{name} / ours" for name in list(losses())[1:]]
    assert header == ["N", "D", "ms", *ratios, "extra MiB", *ratios]
    assert [row[:2] for row in rows] == [["16", "8"], ["16", "24"]]
    for row in rows:
        assert all(float(time) > 0 for time in row[2 : 3 + len(ratios)])
        assert all(figure == "?" or float(figure) >= 0 for figure in row[3 + len(ratios) :])


@pytest.mark.slow
@on_linux
def test_over_two_processes_ours_sends_and_computes_less_than_the_authors() -> None:
    flags = ["--processes", "1", "2", "--rows", "256", "--dims", "512"]
    done = run_script("scripts/benchmark.py", "loss", *flags)
    assert done.returncode == 0, done.stderr
    header, rows = table(done.stdout)
    columns = ["processes", "loss", "GFLOP per process", "MiB sent per process", "ms"]
    assert header == ["N", "D", *columns]
    flops = {(int(row[2]), row[3]): float(row[4]) for row in rows}
    sent = {(int(row[2]), row[3]): float(row[5]) for row in rows}
    assert list(flops) == [(world, name) for world in (1, 2) for name in ("vicreg_hf", "authors")]
    assert sent[1, "vicreg_hf"] == sent[1, "authors"] == 0
    assert 0 < sent[2, "vicreg_hf"] < sent[2, "authors"]
    assert all(0 < flops[world, "vicreg_hf"] < flops[world, "authors"] for world in (1, 2))
    assert flops[2, "vicreg_hf"] < flops[1, "vicreg_hf"]


@on_linux
def test_peak_memory_is_what_was_allocated_although_it_was_freed() -> None:
    with memory_process() as pool:
        for blocks in (1, 64):  # of 1 MiB glibc keeps some, unless told not to
            for _ in range(2):  # before and after as much was freed
                sizes = [64 // blocks * MIB // 4] * blocks
                allocate = partial(list, map(torch.ones, sizes))
                mib = pool.submit(peak_extra_mib, allocate, CPU).result()
                assert mib is not None
                assert 60 < mib < 80


def all_rows(dim: int) -> tuple[Tensor, Tensor]:
    """Two branches of six rows; not centred, all terms active."""
    generator = torch.Generator().manual_seed(0)
    z, z_prime = torch.randn(2, 6, dim, generator=generator, dtype=torch.float64) * 0.8 + 0.3
    return z, z_prime


def loss_and_gradients(name: str, z: Tensor, z_prime: Tensor) -> list[Tensor]:
    z, z_prime = z.clone().requires_grad_(), z_prime.clone().requires_grad_()
    loss = losses()[name](z, z_prime)
    return [loss.detach(), *torch.autograd.grad(loss, (z, z_prime))]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", list(losses())[1:])
def test_what_ours_is_compared_to_computes_the_same(name: str, dim: int) -> None:
    expected = loss_and_gradients("vicreg_hf", *all_rows(dim))
    actual = loss_and_gradients(name, *all_rows(dim))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def loss_and_gradients_of_own_rows(name: str, dim: int) -> list[Tensor]:
    z, z_prime = (x.chunk(world_size())[rank()] for x in all_rows(dim))
    return loss_and_gradients(name, z, z_prime)


def averaged_as_by_ddp(results: list[list[Tensor]]) -> list[Tensor]:
    """The mean of the losses, and every row's gradient in the mean of the processes' losses."""
    values, *grads = zip(*results, strict=True)
    return [torch.stack(values).mean(), *(torch.cat(grad) / len(results) for grad in grads)]


@pytest.mark.parametrize("dim", DIMS)
def test_over_two_processes_the_authors_is_that_of_one_process(gloo: GlooPool, dim: int) -> None:
    # The authors' invariance is of the own rows: only its mean over processes is the batch's.
    actual = averaged_as_by_ddp(gloo.run(2, loss_and_gradients_of_own_rows, "authors", dim))
    expected = loss_and_gradients("authors", *all_rows(dim))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(32, 32), (60, 40)], ids=["in memory", "decoded"])
def test_the_bottleneck_is_the_slowest_stage(size: tuple[int, int], tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", size=size)
    flags = [*SMALL[:-1], "--num_workers=1", "--image_size=32", f"--dataset_name={folder}"]
    text, _, rows = measured("data", *flags)
    rates = {name: float(rate) for name, rate in rows}
    assert {"transfer", "model"} < rates.keys()
    assert len(rates) == (3 if size == (32, 32) else 5)
    assert all(rate > 0 for rate in rates.values())
    slowest = text.splitlines()[-1].removeprefix("The bottleneck is: ").removesuffix(".")
    assert rates[slowest] == min(rates.values())


@pytest.mark.parametrize("only", [NAMES, ["bare"]], ids=["all", "bare"])
def test_training_is_measured_against_the_backbone_and_others(
    only: list[str],
) -> None:
    text, header, all_rows = measured(
        "train", *SMALLEST, "--expander_dims=16-16", "--steps=1", "--rounds=1", "--num_workers=0",
        "--no-channels_last", "--only", *only,
    )  # fmt: skip
    assert "channels first" in text
    assert "test_resnet, 8 images of 32 pixels in memory" in text
    assert len(header) == 6  # no memory on CPU
    rows = {name: figures for name, *figures in all_rows}
    assert list(rows) == ["bare backbone", *only[1:]]
    if find_spec("lightly") is None and "lightly" in only:
        assert rows.pop("lightly")[0] == "not installed"
    milliseconds = {name: float(figures[1]) for name, figures in rows.items()}
    for name, (precision, ms, rate, part, multiple) in rows.items():
        assert precision == "fp32"
        assert float(rate) == pytest.approx(1000 * 16 / float(ms), rel=0.01, abs=1)
        expected = 100 * milliseconds["bare backbone"] / milliseconds[name]
        assert share(part) == pytest.approx(expected, abs=0.2)
        if "authors" not in only:
            assert multiple == "-"
            continue
        expected = milliseconds["authors"] / milliseconds[name]
        assert float(multiple) == pytest.approx(expected, rel=0.01, abs=0.01)


def test_training_is_measured_on_images_of_its_own() -> None:
    with pytest.raises(ValueError, match="train makes its own images, got --dataset_name; leave"):
        measured("train", "--dataset_name=demo")


def test_the_authors_step_changes_weights_as_ours_does() -> None:
    """Loss and optimiser together, on the expander alone."""
    torch.manual_seed(0)
    theirs = expander(6, [8, 8, 5])
    ours = copy.deepcopy(theirs)
    step = plain_step(
        theirs, authors_loss, LARS(theirs.parameters(), 0.5), device=CPU, precision="fp32"
    )
    optimizer = LARS(ours.parameters(), 0.5)
    for x, x_prime in torch.randn(3, 2, 16, 6):
        step(x, x_prime)
        vicreg_loss(ours(x), ours(x_prime)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict(), rtol=1e-4, atol=1e-5)
