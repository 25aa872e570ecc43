"""What the benchmark prints when started as a user does, and that it compares equal things."""

from __future__ import annotations

import copy
import io
import re
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import GlooPool
from PIL import Image
from torch import Tensor
from warm import run_script
from workflow import ROOT, SMALL, write_images

from vicreg_hf.benchmarks.contenders import loaded_views, plain_step
from vicreg_hf.benchmarks.data import Views, _ratios, bottleneck, photographs, pil_view
from vicreg_hf.benchmarks.loss import _figures, authors_loss, losses
from vicreg_hf.benchmarks.measuring import MIB, memory_process, peak_extra_mib
from vicreg_hf.benchmarks.train import _pictures, training
from vicreg_hf.loss.vicreg import vicreg_loss
from vicreg_hf.models.expander import expander
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.building.optimizers import LARS
from vicreg_hf.views.presets import PRESETS

CPU = torch.device("cpu")
DIMS = [4, 24]  # fewer dimensions than rows, and more
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux records it")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_a_script_is_at_most_a_page(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 60


def printed(*words: str) -> list[str]:
    """The lines that the script prints."""
    result = run_script("scripts/benchmark.py", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def table(lines: list[str]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table with which lines end."""
    cells = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    header, rule, *rows = cells
    assert rule == ["---"] * len(header)
    assert all(len(row) == len(header) for row in rows)
    return header, rows


SMALLEST = ["--architecture=test_resnet", "--batch_size=8"]


def test_extraction_is_measured_against_the_bare_forward_pass() -> None:
    above, *lines = printed("features", *SMALLEST, "--num_images=24", "--side=32")
    header, ((name, images, bare, whole, share),) = table(lines)
    assert "commit" in above
    assert header[2:4] == ["forward alone, images/s", "extraction, images/s"]
    assert (name, images) == ("test_resnet at 32 px", "24")
    expected = 100 * float(whole) / float(bare)
    assert float(share.removesuffix(" %")) == pytest.approx(expected, rel=0.2, abs=2)


def test_saving_is_measured_in_the_background_and_in_the_foreground() -> None:
    lines = printed("checkpoint", *SMALLEST, "--image_size=32", "--expander_dims=64-64")
    step = float(re.search(r"([\d.]+) s a step", lines[1])[1])  # pyright: ignore[reportOptionalSubscript]
    _, rows = table(lines)
    assert [row[0] for row in rows] == ["in the foreground", "in the background"]
    for _, cost, share in rows:
        expected = 100 * float(cost) / (float(cost) + 500 * step)
        assert float(share.removesuffix(" %")) == pytest.approx(expected, abs=1)


def test_one_process_prints_a_line_for_every_pair_of_rows_and_dimensions() -> None:
    above, *lines = printed("loss", "--rows", "16", "--dims", "8", "24", "--device", "cpu")
    assert re.search(rf"\d+ threads.*torch {re.escape(torch.__version__)}.*commit", above)
    header, rows = table(lines)
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
    header, rows = table(printed("loss", *flags))
    columns = ["processes", "loss", "GFLOP per process", "MiB sent per process", "ms"]
    assert header == ["N", "D", *columns]
    flops = {(int(row[2]), row[3]): float(row[4]) for row in rows}
    sent = {(int(row[2]), row[3]): float(row[5]) for row in rows}
    assert list(flops) == [(world, name) for world in (1, 2) for name in ("vicreg_hf", "authors")]
    assert sent[1, "vicreg_hf"] == sent[1, "authors"] == 0
    assert 0 < sent[2, "vicreg_hf"] < sent[2, "authors"]
    assert all(0 < flops[world, "vicreg_hf"] < flops[world, "authors"] for world in (1, 2))
    assert flops[2, "vicreg_hf"] < flops[1, "vicreg_hf"]


# What it measures


def extra_mib_of(blocks: int) -> list[float | None]:
    """What 64 MiB in so many tensors measure, before and after as much was freed."""

    def allocate() -> None:
        _ = [torch.ones(64 // blocks * MIB // 4) for _ in range(blocks)]

    return [peak_extra_mib(allocate, CPU) for _ in range(2)]


@on_linux
def test_peak_memory_is_what_was_allocated_although_it_was_freed() -> None:
    with memory_process() as pool:
        for blocks in (1, 64):  # of 1 MiB glibc keeps some, unless told not to
            measured = pool.submit(extra_mib_of, blocks).result()
            assert all(mib is not None and 60 < mib < 80 for mib in measured)


def test_there_is_no_ratio_to_memory_that_did_not_rise() -> None:
    seconds = {"vicreg_hf": 1.0, "authors": 2.0}
    memory: dict[str, float | None] = {"vicreg_hf": 0.0, "authors": 0.5}
    assert _figures(seconds, memory) == ["1000.0", "2.00", "0", "?"]


# What it compares


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
@pytest.mark.parametrize("name", ["vicreg_hf", "authors"])
def test_over_two_processes_both_give_what_one_process_gives(
    gloo: GlooPool, name: str, dim: int
) -> None:
    # The authors' invariance is of the own rows: only its mean over processes is the batch's.
    actual = averaged_as_by_ddp(gloo.run(2, loss_and_gradients_of_own_rows, name, dim))
    expected = loss_and_gradients("authors", *all_rows(dim))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# Views


def test_views_are_measured_against_the_authors_pipeline() -> None:
    took = {"authors": 8.0, "everything": 2.0}
    lines = _ratios(took).splitlines()
    assert lines[-1] == "| everything | 2.000 | 4.00 |"
    (image,) = photographs(1, 60, 40)
    view: Any = pil_view(PRESETS["authors"][1], 24)(image)
    assert view.shape == (3, 24, 24)


@pytest.mark.parametrize("size", [(32, 32), (60, 40)], ids=["in memory", "decoded"])
def test_the_bottleneck_of_a_run_is_its_slowest_stage(
    size: tuple[int, int], tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "images", size=size)
    flags = [*SMALL[:-1], "--num_workers=1", "--image_size=32", f"--dataset_name={folder}"]
    printed = bottleneck(parse_arguments(flags))
    rows = [line[2:-2].split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    rates = {name: float(rate) for name, rate in rows[2:]}
    assert {"transfer", "model"} < rates.keys()
    assert len(rates) == (3 if size == (32, 32) else 5)
    assert all(rate > 0 for rate in rates.values())
    slowest = printed.splitlines()[-1].removeprefix("The bottleneck is: ").removesuffix(".")
    assert rates[slowest] == min(rates.values())


# Training


def test_training_is_measured_against_the_bare_backbone_the_authors_and_lightly() -> None:
    above, settings, *lines = printed(
        "train", *SMALLEST, "--expander_dims=16-16", "--steps=1", "--rounds=1", "--device=cpu",
        "--precision=fp32", "--num_workers=1",
    )  # fmt: skip
    assert f"torch {torch.__version__}" in above
    assert "test_resnet, 8 images of 32 pixels in memory" in settings
    header, all_rows = table(lines)
    assert len(header) == 6  # no memory on CPU
    rows = {name: figures for name, *figures in all_rows}
    assert list(rows) == ["bare backbone", "vicreg_hf", "authors", "lightly"]
    if find_spec("lightly") is None:
        assert rows.pop("lightly")[0] == "not installed"
    milliseconds = {name: float(figures[1]) for name, figures in rows.items()}
    for name, (precision, ms, rate, share, multiple) in rows.items():
        assert precision == "fp32"
        assert float(rate) == pytest.approx(1000 * 16 / float(ms), rel=0.01, abs=1)
        expected = 100 * milliseconds["bare backbone"] / milliseconds[name]
        assert float(share.removesuffix(" %")) == pytest.approx(expected, abs=0.2)
        expected = milliseconds["authors"] / milliseconds[name]
        assert float(multiple) == pytest.approx(expected, rel=0.01, abs=0.01)


def test_what_is_left_out_has_no_row_and_no_ratio_to_it() -> None:
    printed = training(
        ["--architecture=test_resnet", "--batch_size=4", "--expander_dims=8"], precision="fp32",
        device="cpu", channels_last=False, steps=1, rounds=1, only=["bare"],
    )  # fmt: skip
    (row,) = [line for line in printed.splitlines() if line.startswith("| bare")]
    assert row.endswith(" | 100.0 % | - |")
    assert "channels first" in printed


def test_training_is_measured_on_images_of_its_own() -> None:
    result = run_script("scripts/benchmark.py", "train", "--dataset_name=demo")
    assert result.returncode == 1
    said = "error: train makes its own images, got --dataset_name; leave it out."
    assert said in result.stderr.splitlines()
    assert "Traceback" not in result.stderr


def test_large_images_are_decoded_as_they_come() -> None:
    pictures = _pictures(65, 3)
    for picture in pictures:
        assert isinstance(picture, bytes)
        assert Image.open(io.BytesIO(picture)).size == (500, 375)
    make = Views(pil_view, PRESETS["authors"][:2], 65)
    loaded = loaded_views(pictures, make, batch_size=2, num_workers=0, device=CPU)
    with closing(loaded) as batches:
        shapes = [[tuple(x.shape) for x in next(batches)] for _ in range(2)]  # beyond an epoch
    assert shapes == [[(2, 3, 65, 65)] * 2] * 2


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
