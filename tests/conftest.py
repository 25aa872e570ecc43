"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import io
import os

# Threads that wait do not keep a core, which another test can use.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# Nothing that is imported is garbage.
gc.disable()

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from gloo import GlooPool
from hub import Hub, connected, running_hub
from sklearn.datasets import load_sample_images
from torch import Tensor
from workflow import WHOLE, train, write_images

# The same examples in every run, and no limit on the time one takes.
hypothesis.settings.register_profile("vicreg", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("vicreg")

# Models here are tiny: threads would spend their time waiting for each other on a busy machine.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run `-m gpu` on the CPU, tiny")


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU, of which nothing that is imported takes notice, from all but the checks of it.

    Other tests compare bits, and two processes with one, as a CPU gives them.
    """
    chosen = config.option.markexpr.replace("not gpu", "")
    if "gpu" not in chosen or config.option.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, as tests wait for clocks and for processes that they start."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1 if affinity is None else len(affinity(0))) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no worker is alone with them at the end."""
    items.sort(key=lambda item: "workflows" not in item.path.parts)


def pytest_sessionstart() -> None:
    gc.enable()  # also in the process that only hands tests out


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported stays, and would be looked through again and again


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()


@contextmanager
def on_one_core() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Keep what a module starts to one core, where many steps would wait for other tests' threads.

    Not for loading workers: torch advises against more of them than cores.
    """
    with on_one_core():
        yield


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub of a module's own, to which a writer is logged in."""
    with running_hub() as hub, connected(hub, tmp_path_factory.mktemp("home")):
        yield hub


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """(16, 3, 80, 120) uint8 pieces of two photographs."""
    bundle: Any = load_sample_images()
    pieces = [
        image[y : y + 80, x : x + 120]
        for image in bundle.images
        for y in (0, 160, 320)
        for x in (0, 240, 480)
    ]
    return torch.from_numpy(np.stack(pieces[:16])).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two classes that a linear classifier separates; an epoch is 4 steps of 16."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def whole_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, beside a file of what it printed; tests copy it."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    with on_one_core(), redirect_stdout(io.StringIO()) as printed:
        train(images, directory, *WHOLE)
    (directory.parent / "printed").write_text(printed.getvalue())
    return directory
