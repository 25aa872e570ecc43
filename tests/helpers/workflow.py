"""Small data sets, and pretraining on them in this process and as users start it."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SMALL = [
    "--architecture=test_resnet", "--expander_dims=32-32", "--optimizer=lars", "--base_lr=0.3",
    "--batch_size=16", "--logging_steps=1", "--num_workers=0",
]  # fmt: skip
"""Settings with which a step takes milliseconds."""
WHOLE = ["--max_steps=8", "--save_steps=3", "--knn_steps=3", "--online_probe=true"]
"""Settings of the fixture `whole_run`: two epochs, measured and saved in the middle of both."""
LIMIT = 900
"""Seconds after which a process counts as hung, also on a busy machine."""


def write_images(
    folder: Path, *, rows: int = 64, size: tuple[int, int] = (32, 32), bad: Collection[int] = ()
) -> Path:
    """A parquet data set of two classes, noise on dark or on light, in splits train and test.

    Bad rows of train hold a page in place of an image.
    """
    rng = np.random.default_rng(0)
    names = datasets.ClassLabel(names=["dark", "light"])
    features = datasets.Features({"picture": datasets.Image(), "kind": names})
    for split, count in {"train": rows, "test": rows // 2}.items():
        kinds = rng.integers(2, size=count)
        pictures = []
        for kind in kinds:
            pixels = rng.integers(0, 128, size=(size[1], size[0], 3)) + 127 * kind
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        for row in bad if split == "train" else ():
            pictures[row]["bytes"] = b"<html>404</html>"
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": kinds}, features=features)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"{split}.parquet")
    return folder


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell, with this interpreter's programs first and no network."""
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ["PATH"]])
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | extra


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=LIMIT
    )


def flags_of(data: Path, output_dir: Path, *more: str) -> list[str]:
    """Flags of scripts/pretrain.py for a small run."""
    return [*SMALL, f"--dataset_name={data}", f"--output_dir={output_dir}", *more]


def train(data: Path, output_dir: Path, *flags: str, **own: Any) -> list[dict[str, Any]]:
    """Pretrain in this process, with parts of one's own; the lines of metrics.jsonl."""
    from vicreg_hf import pretrain
    from vicreg_hf.settings.command_line import parse_arguments

    pretrain(parse_arguments(flags_of(data, output_dir, *flags)), **own)
    return metrics(output_dir)


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def without(keys: set[str], output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and some other keys."""
    keys = keys | {"views_per_second"}
    return [{k: v for k, v in row.items() if k not in keys} for row in metrics(output_dir)]


def assert_same_file(file: Path, expected: Path) -> None:
    """The tensors of two safetensors files are equal, bit for bit."""
    tensors, others = load_file(file), load_file(expected)
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), (file, name)


def assert_same_run(run: Path, expected: Path) -> None:
    """The metrics and the last checkpoint of two runs are equal, bit for bit."""
    assert without(set(), run) == without(set(), expected)
    last = Path("checkpoints", f"step-{metrics(expected)[-1]['step']}")
    files = [path.name for path in (expected / last).glob("*.safetensors")]
    assert {"model.safetensors", "optimizer.safetensors"} <= set(files)
    for name in files:
        assert_same_file(run / last / name, expected / last / name)


def interrupt(whole: Path, copy: Path) -> Path:
    """Copy a run as if it had been killed while it wrote its last checkpoint."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "encoder")
    last = max((copy / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    os.truncate(last / "model.safetensors", (last / "model.safetensors").stat().st_size - 1)
    return copy


def leave_behind(folder: Path, *, hours: float) -> Path:
    """Leave what a process that was killed that long ago had begun to write."""
    left = folder / f".results.json.{uuid.uuid4()}.partial"
    left.write_text('{"results": [')
    then = time.time() - 3600 * hours
    os.utime(left, (then, then))
    return left


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Let no file grow beyond that many bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
