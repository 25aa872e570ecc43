"""The time that saving adds to a training step, in the background and in the foreground."""

from __future__ import annotations

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from vicreg_hf.benchmarks.measuring import MIB, seconds_of, surroundings, table
from vicreg_hf.checkpoints.writing import CheckpointWriter
from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.checks import read_widths
from vicreg_hf.training.building.optimizers import create_optimizer


def checkpoints(
    architecture: str,
    device: str,
    *,
    batch_size: int,
    image_size: int,
    expander_dims: str,
    save_steps: int,
    rounds: int = 4,
) -> str:
    """Seconds that a save adds to a run, and their share of it at one save in `save_steps` steps.

    Steps without a save and steps with one beginning are taken in turn; in either case as many as
    a save in the background lasts, so that what it takes from later steps counts.

    Args:
        rounds: at least 2, as the first is not counted.
    """
    on = torch.device(device)
    widths = read_widths("expander_dims", expander_dims)
    model = VICRegModel(VICRegConfig(architecture=architecture, expander_dims=widths))
    model.to(memory_format=torch.channels_last).to(device)  # pyright: ignore[reportCallIssue]
    optimizer = create_optimizer("lars", model, lr=1e-3, weight_decay=1e-6)
    views = torch.randn(2, batch_size, 3, image_size, image_size, device=on)

    def step() -> None:
        with torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda"):
            loss = model(*views).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(steps: int) -> float:
        return seconds_of(lambda: [step() for _ in range(steps)], on)

    def save(writer: CheckpointWriter, number: int, steps: int) -> None:
        """Save, and take steps meanwhile."""
        writer.save(number, model, optimizer, {})
        seconds(steps)
        writer.wait()

    seconds(3)
    a_step = seconds(3) / 3
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder) / "background")
        foreground, added, plain = [], [], []
        size = 0
        for number in range(max(2, rounds)):
            waited_for = CheckpointWriter(Path(folder) / "foreground")
            foreground.append(seconds_of(partial(save, waited_for, number, 0), on))
            files = (waited_for.folder / f"step-{number}").iterdir()
            size = sum(file.stat().st_size for file in files)
            steps = int(3 * max(foreground) / a_step) + 3
            without = seconds(steps)
            added.append(seconds_of(partial(save, writer, number, steps), on) - without)
            plain.append(without / steps)
            shown = f"{foreground[-1]:.2f} s in the foreground, {added[-1]:.2f} s in the background"
            print(shown, file=sys.stderr, flush=True)
    a_step = statistics.median(plain[1:])  # the first save takes memory that later ones use again
    lines = [
        [name, f"{cost:.2f}", f"{100 * cost / (cost + save_steps * a_step):.2f} %"]
        for name, cost in (
            ("in the foreground", statistics.median(foreground[1:])),
            ("in the background", statistics.median(added[1:])),
        )
    ]
    head = (
        f"{architecture}, {batch_size} images of {image_size} pixels, {a_step:.3f} s a step, "
        f"checkpoints of {size / MIB:.0f} MiB"
    )
    header = ["save", "seconds added", f"of the run at --save_steps {save_steps}"]
    return f"{surroundings(on)}\n{head}\n{table(header, lines)}"
