"""Checkpoints: which files and values each has, how these are verified, found and loaded.

A checkpoint is a directory `step-N`, where N optimiser steps were taken. Nothing in it is pickled.

    config.json            the training model's `VICRegConfig`
    model.safetensors      its weights and buffers
    optimizer.safetensors  the tensors of the optimiser's state, by parameter and name
    optimizer.json         the rest of that state, and the settings of its parameter groups
    probe.safetensors      the online probe's state, where the run has one
    average.safetensors    the moving average of weights and buffers, where the run has one
    manifest.json          all other values:
        step               N
        world_size         processes of the run
        parts              processes that each wrote a part of the model, 1 if it is left out
        versions           versions of Python and of the packages that results depend on
        state              a `RunState`
        settings_sha256    SHA-256 of the state's settings
        files              size in bytes and SHA-256 of every other file, by its name
        sha256             SHA-256 of the values above

Where FSDP sharded the model, `model.1-of-2.safetensors` and its like stand in for weights,
optimiser state and average. Each holds a process's rows of every sharded tensor, perhaps none, and
the first also every tensor that was whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vicreg_hf.runtime.checks import one_line

MANIFEST = "manifest.json"
MODEL, OPTIMIZER, OPTIMIZER_REST = "model.safetensors", "optimizer.safetensors", "optimizer.json"
PROBE, AVERAGE = "probe.safetensors", "average.safetensors"
FILES = {"config.json", MODEL, OPTIMIZER, OPTIMIZER_REST}
"""The files that every checkpoint has beside its manifest, if it has no parts."""
PREFIX = "step-"
GROUP = "group"
"""Tensors of a parameter group are named after it, as `group0.lr`; others after a parameter."""

_NAME = re.compile(rf"{PREFIX}(0|[1-9][0-9]*)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class BestStep(TypedDict):
    """The step of a run whose measurement is the best so far."""

    measure: str
    """The value of `keep_best`."""
    step: int
    value: float
    images: str
    """The images that were measured."""


class RunState(TypedDict, total=False):
    """The values of a run beside weights, optimiser, probe and step."""

    settings: dict[str, Any]
    """All fields of `PretrainingArguments`."""
    total_steps: int
    """Optimiser steps of the whole run."""
    data: dict[str, Any]
    """Number of images and checksums of the training data."""
    seconds: float
    """Time that all sessions of the run took together."""
    scaler: dict[str, Any] | None
    """State of the gradient scaler of float16."""
    precision: str
    """accelerate's mixed_precision."""
    threads: int | None
    """Threads of a process on CPU, which decide the order of sums."""
    prime_sha256: str | None
    """Checksum of the second branch's description, where the branches have weights of their own."""
    starts: dict[str, Any]
    """Facts of the encoders that the branches started from, by setting; see `Source.facts`."""
    labels_sha256: str | None
    """Checksum of the labels that the online probe learns."""
    milestone: bool
    """Whether the checkpoint is kept when there are newer ones."""
    best: BestStep | None
    """The best step so far, this one or an earlier one, whose checkpoint is kept for as long."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The values in the manifest of a checkpoint that is whole."""
    return json.loads((path / MANIFEST).read_text())


def step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def newest_first(folder: Path) -> list[Path]:
    """Everything in a folder that is named like a checkpoint, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def find_damage(path: Path) -> str | None:
    """The first damage found in a checkpoint, in words, or None.

    Raises:
        OSError: it cannot be read, which says nothing about what it holds.
    """
    try:
        manifest = read_manifest(path)
        if manifest.pop("sha256") != digest(manifest):
            return f"{MANIFEST} has another checksum"
        if manifest["step"] != step_of(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        parts, listed = manifest.get("parts", 1), manifest["files"].keys() - {PROBE}
        wanted = {name for file in FILES for name in names_of_parts(file, parts)}
        if listed not in (wanted, wanted | set(names_of_parts(AVERAGE, parts))):
            return f"{MANIFEST} lists other files"
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has another size"
            if file_digest(path / name) != expected["sha256"]:
                return f"{name} has another checksum"
    except (
        FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, LookupError,
        TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        return f"{type(error).__name__}: {error}"
    return None


def digest(values: Any) -> str:
    """SHA-256 of values as JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_of_parts(file: str, parts: int) -> list[str]:
    """The files of a checkpoint that stand in for one, in the order of the processes."""
    stem, _, kind = file.partition(".")
    if parts == 1 or kind != "safetensors":
        return [file]
    return [f"{stem}.{number + 1}-of-{parts}.{kind}" for number in range(parts)]


def paths_of_parts(directory: Path, file: str) -> list[Path]:
    """The paths of a checkpoint's file, or of any other directory's."""
    whole = not (directory / MANIFEST).is_file()
    parts = 1 if whole else read_manifest(directory).get("parts", 1)
    return [directory / name for name in names_of_parts(file, parts)]


def read_tensors(
    directory: Path, file: str, like: Callable[[str], Any] = lambda _: None
) -> dict[str, Tensor]:
    """The tensors of a file, or of the parts that stand in for it.

    Args:
        like: gives the tensor that one is loaded into by its name. Where that is sharded, only the
            rows of this process are read.
    """
    with ExitStack() as stack:
        parts = [
            stack.enter_context(safe_open(path, "pt")) for path in paths_of_parts(directory, file)
        ]
        names = [set(part.keys()) for part in parts]
        return {
            name: _read_rows(
                [part for part, own in zip(parts, names, strict=True) if name in own],
                name, like(name),
            )
            for name in parts[0].keys()  # noqa: SIM118 - no dict
        }  # fmt: skip


def _read_rows(parts: Sequence[Any], name: str, like: Any) -> Tensor:
    """A tensor, of which each part holds some rows; see `read_tensors`."""
    shape = parts[0].get_slice(name).get_shape()
    lengths = [part.get_slice(name).get_shape()[0] for part in parts] if shape else []
    if not isinstance(like, DTensor) or [sum(lengths), *shape[1:]] != list(like.shape):
        found = [part.get_tensor(name) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)
    # as torch.chunk divides rows among processes
    most = -(-sum(lengths) // like.device_mesh.size())
    first = like.device_mesh.get_local_rank() * most
    rows = [
        part.get_slice(name)[max(first - start, 0) : max(first + most - start, 0)]
        for part, start in zip(parts, accumulate(lengths, initial=0), strict=False)
    ]
    return DTensor.from_local(
        torch.cat(rows).to(like.device), like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


def split_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as a flat dict of tensors and JSON for everything else."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    groups = {f"{GROUP}{number}": group for number, group in enumerate(state["param_groups"])}
    for owner, entries in (*state["state"].items(), *groups.items()):
        rest[str(owner)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}.{name}"] = value
            else:
                rest[str(owner)][name] = value
    param_groups = [rest.pop(name) for name in groups]
    return tensors, {"param_groups": param_groups, "scalars": rest}


def join_tensors(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict that `split_tensors` has taken apart."""
    state = {int(index): dict(entries) for index, entries in rest["scalars"].items()}
    groups = [dict(group) for group in rest["param_groups"]]
    for key, value in tensors.items():
        owner, name = key.split(".", 1)
        if owner.startswith(GROUP):
            groups[int(owner.removeprefix(GROUP))][name] = value
        else:
            state[int(owner)][name] = value
    return {"state": state, "param_groups": groups}


def newest_checkpoint(folder: Path, *, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as its manifest says.

    Args:
        before: a step; only checkpoints of earlier ones count.

    Returns:
        Its path or None, and one sentence for every newer one that is damaged.

    Raises:
        CheckpointError: a newer one cannot be read, which says nothing about what it holds.
    """
    damaged = []
    for path in newest_first(folder):
        if before is not None and step_of(path) >= before:
            continue
        try:
            damage = find_damage(path)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({error}); start again when it can, or move it "
                "away to go on from the one before."
            ) from error
        if damage is None:
            return path, damaged
        damaged.append(f"checkpoint {path} is damaged ({damage}) and is passed over.")
    return None, damaged


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Load weights and optimiser state into objects of the same shape.

    Raises:
        CheckpointError: the checkpoint belongs to another model or optimiser.
    """
    with _misfits(path):
        rest = json.loads((path / OPTIMIZER_REST).read_text())
        params = (p for group in optimizer.param_groups for p in group["params"])
        by_index = {str(index): p for index, p in enumerate(params)}
        tensors = read_tensors(path, OPTIMIZER, lambda key: by_index.get(key.partition(".")[0]))
        model.load_state_dict(read_tensors(path, MODEL, model.state_dict().get))
        optimizer.load_state_dict(join_tensors(tensors, rest))


def load_weights(path: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Load the weights alone.

    Args:
        averaged: load their moving average instead.

    Raises:
        CheckpointError: the checkpoint belongs to another model, or has no average.
    """
    with _misfits(path):
        file = AVERAGE if averaged else MODEL
        model.load_state_dict(read_tensors(path, file, model.state_dict().get))


@contextmanager
def _misfits(path: Path) -> Iterator[None]:
    """Say in one sentence that a checkpoint belongs to another model or optimiser."""
    try:
        yield
    # torch raises RuntimeError for other shapes and ValueError for other parameter groups
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this model and optimiser: "
            f"{one_line(error)} Choose another output_dir, or --resume never to "
            "start over."
        ) from error


def published_weights(directory: Path) -> str:
    """The file of a checkpoint, or of another directory, with the weights that are published."""
    if not (directory / MANIFEST).is_file():
        return MODEL
    manifest = read_manifest(directory)
    first = names_of_parts(AVERAGE, manifest.get("parts", 1))[0]
    return AVERAGE if first in manifest["files"] else MODEL


def load_average(path: Path, model: nn.Module) -> bool:
    """Load the moving average of a checkpoint that is whole; False where it has none.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    has_average = published_weights(path) == AVERAGE
    if has_average:
        load_weights(path, model, averaged=True)
    return has_average


def load_probe(path: Path) -> dict[str, Tensor] | None:
    """The online probe's state in a checkpoint that is whole; None where it has none."""
    return load_file(path / PROBE) if PROBE in read_manifest(path)["files"] else None
