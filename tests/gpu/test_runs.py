"""Whole runs on a GPU: that they go on, do not wait, learn in any precision, and how they end."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModel
from workflow import SMALL, flags_of, metrics, write_images

from vicreg_hf import Callback, VICRegModel, pretrain
from vicreg_hf.checkpoints.reading import newest_checkpoint, read_manifest
from vicreg_hf.data.workers import LoadingError
from vicreg_hf.runtime.signals import Signals, Stopped
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.faults import OutOfMemory
from vicreg_hf.training.pretrain import fit
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import make_output_dir, setup
from vicreg_hf.training.step import (
    Step,
    StepChecks,
    take_gradients,
    take_step,
    views_from_here,
)

pytestmark = [
    pytest.mark.gpu,
    # the compiler and CUDA advise in warnings; what may not be is going on without the compiler
    pytest.mark.filterwarnings("default", "error:.*without torch.compile"),
]

AT_THE_END = ["--logging_steps=100", "--save_steps=100", "--warmup_epochs=0", "--image_size=32"]
"""Settings of a run that logs and saves at its end alone."""
SECONDS = 100
"""After which two processes count as hung."""
TERMS = ("loss", "invariance", "variance", "covariance", "embedding_std")


class At(Callback):
    """Does something once, after a step."""

    def __init__(self, number: int, action: Callable[[Run], object]) -> None:
        self.number, self.action = number, action

    def on_step(self, run: Run, step: Step) -> None:
        if step.number == self.number:
            self.action(run)


def train_until(error: type[Exception], words: str, at: At, *flags: str) -> None:
    """Pretrain until an error ends it."""
    with pytest.raises(error, match=words):
        pretrain(parse_arguments(flags), callbacks=[at])


def fitted(*flags: str, callbacks: Sequence[At] = ()) -> list[dict[str, Any]]:
    """Train from where a run is, and publish nothing; the lines of its metrics.jsonl."""
    run = setup(parse_arguments(flags))
    run.output_dir.mkdir(parents=True, exist_ok=True)
    make_output_dir(run)
    run.callbacks = callbacks
    with Signals() as signals:
        fit(run, signals)
    return metrics(run.output_dir)


def newest_step(output_dir: Path) -> int:
    """The step of the newest checkpoint, of which none is damaged."""
    newest, damaged = newest_checkpoint(output_dir / "checkpoints")
    assert newest is not None
    assert not damaged
    return int(newest.name.removeprefix("step-"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images too large for memory."""
    return write_images(tmp_path_factory.mktemp("data") / "files", size=(80, 70))


# From the first step to the last


def test_a_run_that_is_stopped_goes_on_to_the_end_of_one_that_was_not(
    images: Path, tmp_path: Path, tiny: bool
) -> None:
    more = ["--max_steps=6", "--save_steps=2", "--online_probe=true"]
    more += [] if tiny else ["--knn_steps=2", "--compile_model=true"]
    expected = fitted(*flags_of(images, tmp_path / "whole", *more))
    run = tmp_path / "run"
    flags = flags_of(images, run, *more)
    stop = At(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    train_until(Stopped, r"Stopped by SIGTERM after step \d of 6", stop, *flags)
    assert newest_step(run) in (4, 5)
    pretrain(parse_arguments([*flags, "--resume=required"]))
    rows = metrics(run)[1:]  # without the untrained encoder's
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    # a GPU adds up in no fixed order, so that steps are equal to rounding alone, which grows
    for row, other in zip(rows, expected, strict=True):
        assert row["lr"] == other["lr"]
        assert row["loss"] == pytest.approx(other["loss"], rel=0.05)
    encoder: Any = AutoModel.from_pretrained(run / "encoder")
    assert encoder(torch.zeros(2, 3, 32, 32)).pooler_output.isfinite().all()


KINDS = {
    "in memory": ["--optimizer=adamw", "--online_probe=true", "--num_local_views=1"],
    "compiled": ["--compile=true", "--compile_model=true", "--ema_decay=0.9"],
    "from files": ["--num_workers=1", "--micro_batch_size=8", "--weights=separate",
                   "--max_grad_norm=1"],
    "attention": ["--architecture=test_vit", '--model_args={"img_size": 32}', "--optimizer=adamw"],
}  # fmt: skip


def forbid_waits(run: Run) -> None:
    """Have torch raise wherever a thread of this process waits for the GPU, but for events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not know of all waits, it says
        torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=run.accelerator.device).item()


@pytest.mark.parametrize("kind", KINDS)
def test_no_thread_waits_for_the_gpu_in_a_step(
    kind: str, images: Path, files: Path, tmp_path: Path, tiny: bool
) -> None:
    """On a CPU there is nothing to wait for; `test_other_devices` counts what a GPU would see."""
    flags = [flag for flag in KINDS[kind] if not (tiny and flag.startswith("--compile"))]
    data = files if kind == "from files" else images
    batch, first, last = (16, 1, 2) if tiny else (64, 6, 14)  # by then all is compiled
    forbid = At(first, lambda run: tiny or forbid_waits(run))
    allow = At(last, lambda _: tiny or torch.cuda.set_sync_debug_mode("default"))
    precise = [] if kind == "compiled" else ["--compile=false"]
    try:
        rows = fitted(
            *flags_of(data, tmp_path, *AT_THE_END, *precise, *flags), f"--batch_size={batch}",
            f"--max_steps={last + 1}", callbacks=[forbid, allow],
        )  # fmt: skip
    finally:
        if not tiny:
            torch.cuda.set_sync_debug_mode("default")
    assert rows[-1]["step"] == last + 1


# Precisions


def begun(data: Path, directory: Path, *more: str) -> Run:
    own = [f"--dataset_name={data}", f"--output_dir={directory}", "--warmup_epochs=0"]
    run = setup(parse_arguments([*SMALL, *own, "--compile=false", *more]))
    run.wrapped.train()
    return run


def take(run: Run, views: tuple[Any, ...]) -> float:
    """Take a step as `fit` does; its loss."""
    checks = StepChecks(run)
    step = take_gradients(run, views)
    checks.start(step)
    assert checks.collect(include_latest=True).bad_step is None
    take_step(run)
    return step.output["loss"].item()


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in run.model.parameters()])


def test_every_precision_begins_as_float64_and_learns(
    precision: str, images: Path, tmp_path: Path, device: torch.device
) -> None:
    run = begun(images, tmp_path, "--max_steps=6")
    assert run.accelerator.device.type == device.type
    batches = list(views_from_here(run))
    exact: Any = VICRegModel(run.model.config).double().train()
    exact.to(device).load_state_dict(run.model.state_dict())
    loss = exact(*(x.double() for x in batches[0])).loss
    losses = [take(run, views) for views in batches]
    # twenty layers round to 2^-8 in bfloat16, and on a GPU convolutions in float32 to 2^-11
    assert losses[0] == pytest.approx(loss.item(), rel=0.01 if precision == "no" else 0.05)
    assert all(map(math.isfinite, losses))
    assert weights(run).isfinite().all()
    assert run.model.backbone.training


@pytest.mark.usefixtures("fp16")
def test_steps_that_overflow_in_float16_are_left_out_until_the_scale_fits(
    images: Path, tmp_path: Path, tiny: bool
) -> None:
    run = begun(images, tmp_path, "--max_steps=40")
    scaler: Any = run.accelerator.scaler
    assert (scaler is None) == tiny  # accelerate has no float16 on CPU
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    seen = [weights(run)]
    for views in islice(views_from_here(run), 4 if tiny else 40):
        take(run, views)
        seen.append(weights(run))
    assert tiny or torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[-1], seen[-2])
    assert all(each.isfinite().all() for each in seen)
    if scaler is not None:
        assert 1 < scaler.get_scale() < 2.0**40


# Several processes


def fit_as(rank: int, port: int, flags: Sequence[str]) -> None:
    """Train as one of two processes, as on two machines of one GPU each: both take the first.

    NCCL refuses that, and gloo does not.
    """
    group = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
    os.environ.update({name: str(value) for name, value in group.items()})
    torch.backends.cudnn.allow_tf32 = False
    PartialState(cpu=not torch.cuda.is_available(), backend="gloo")
    fitted(*flags)
    torch.distributed.destroy_process_group()


def test_two_processes_on_one_gpu_begin_as_one(
    images: Path, tmp_path: Path, pair: Pool, tiny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max_steps=2", "--micro_batch_size=8", "--image_size=32", "--compile=false"]
    two = tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [(rank, port, flags_of(images, two, *flags)) for rank in range(2)]
    pair.starmap_async(fit_as, words, chunksize=1).get(timeout=SECONDS)
    assert read_manifest(two / "checkpoints" / f"step-{newest_step(two)}")["world_size"] == 2
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    alone = fitted(*flags_of(images, tmp_path / "one", *flags))
    rows = metrics(two)
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    for term in TERMS:  # of the first step, as one rounding may switch a ReLU in the next
        assert rows[0][term] == pytest.approx(alone[0][term], rel=1e-5 if tiny else 1e-4), term


# Faults


HELD: list[torch.Tensor] = []
"""Tensors that fill the memory of the GPU."""


def use_up_memory(run: Run) -> None:
    """Leave no memory for the next step; on a CPU ask for more than there is."""
    if run.accelerator.device.type == "cpu":
        torch.empty(2**60, dtype=torch.uint8)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    for size in (2**20, 2**14, 2**9):  # of what is reserved already, too
        with suppress(torch.OutOfMemoryError):
            while True:
                HELD.append(torch.empty(size, dtype=torch.uint8, device=run.accelerator.device))


def test_want_of_memory_is_told_with_what_helps_and_the_run_goes_on(
    images: Path, tmp_path: Path, tiny: bool
) -> None:
    flags = flags_of(images, tmp_path, "--save_steps=2", "--max_steps=6", "--compile=false")
    words = r"at step \d: .* lower --micro_batch_size, now 16"
    try:
        train_until(OutOfMemory, words, At(3, use_up_memory), *flags)
    finally:
        HELD.clear()
        if not tiny:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert newest_step(tmp_path) >= 2
    assert [row["step"] for row in fitted(*flags)] == list(range(7))


def test_a_killed_loading_worker_ends_the_run_which_goes_on(files: Path, tmp_path: Path) -> None:
    own = ["--image_size=32", "--save_steps=3", "--num_workers=1", "--compile=false"]
    flags = flags_of(files, tmp_path, *own)
    others = {*multiprocessing.active_children()}

    def kill(_: Run) -> None:
        (worker,) = {*multiprocessing.active_children()} - others
        worker.kill()

    words = "a loading worker died"
    train_until(LoadingError, words, At(4, kill), *flags, "--max_steps=60")
    last = newest_step(tmp_path) + 3
    rows = fitted(*flags, f"--max_steps={last}")
    assert [row["step"] for row in rows] == list(range(last + 1))
