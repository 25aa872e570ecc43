"""All checks and measurements of one GPU within minutes; whoever stops them keeps what is done."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vicreg_hf.benchmarks.data import MADE
from vicreg_hf.benchmarks.measuring import table
from vicreg_hf.runtime.files import replacing, writing

ROOT = Path(__file__).parents[2]
FORK = get_context("fork")
"""Parts begin with what is imported; this process leaves the GPU alone, which a fork cannot use."""
MARK = "== result =="
LAST_LINES = 30
"""Lines that are shown of a part without a result."""
DONE, STOPPED = "done", "stopped"
MOST_MINUTES = 60

Measure = Callable[[Sequence[str]], str]
"""What a command of benchmark.py prints, by its words."""


class Part(NamedTuple):
    """Something to check or measure, in a process of its own."""

    seconds: int
    """Its share of the time: these add up to nine minutes, and what one leaves goes to others."""
    words: tuple[str, ...] = ("-n", "4", "--dist=worksteal")
    """The words of its command, benchmark.py; those of `pytest -m gpu` begin with a flag."""
    tiny: tuple[str, ...] = ("--rehearse", "-n", "0")
    """Further words of a rehearsal."""


_EAGER = ("--compile_model=false", "--rounds=3")
_PHOTOGRAPHS = ("--batch_size=256", "--steps=15", *_EAGER)
_TINY_MODEL = ("--architecture=test_resnet", "--batch_size=8", "--device=cpu")
_TINY_RUN = (
    "--architecture=test_resnet", "--batch_size=8", "--expander_dims=16-16", "--num_workers=0",
    "--compile_model=false",
)  # fmt: skip
_TINY_TRAINING = (*_TINY_RUN, "--steps=1", "--rounds=1", "--device=cpu")
_RESNET50 = ("--config=imagenet-r50-100ep", *_PHOTOGRAPHS)
PARTS = {
    "checks": Part(130),
    "resnet50": Part(110, ("train", *_RESNET50), (*_TINY_TRAINING, "--image_size=72")),
    "loss": Part(
        30, ("loss", "--rows", "256", "2048", "4096", "--dims", "2048", "8192"),
        ("--rows", "16", "--dims", "8", "--no-memory", "--device=cpu"),
    ),
    "vit_small": Part(
        75, ("train", "--config=vit-small-224", *_PHOTOGRAPHS),
        (*_TINY_TRAINING, "--architecture=test_vit", "--model_args={\"img_size\": 80}",
         "--image_size=80"),
    ),
    "resnet18": Part(45, ("train", "--config=cifar10-r18", *_EAGER), _TINY_TRAINING),
    "input": Part(
        30,
        ("data", "--config=imagenet-r50-100ep", "--batch_size=256", "--compile_model=false",
         f"--dataset_name={MADE}"),
        (*_TINY_RUN, "--image_size=72"),
    ),
    "checkpoints": Part(
        40, ("checkpoint", "--rounds=3", "--expander_dims=2048-2048-2048"),
        (*_TINY_MODEL, "--image_size=32", "--expander_dims=8-8")
    ),
    "extraction": Part(
        30, ("features", "--num_images=4096", "--batch_size=256"),
        (*_TINY_MODEL, "--num_images=16", "--side=32"),
    ),
    "resnet50-compiled": Part(
        50, ("train", *_RESNET50, "--compile_model=true", "--only", "bare", "vicreg_hf"),
        (*_TINY_TRAINING, "--image_size=72"),
    ),
}  # fmt: skip
"""By name, the most important first."""


def gpu(
    measure: Measure, *, minutes: float, output_dir: str, only: Sequence[str], rehearse: bool
) -> str:
    """Run every part within its share of the time; a table of how each has ended.

    Results are written to output_dir as soon as there are any: log.txt while a part runs,
    results.json and results.md after each.

    Args:
        measure: runs the commands of benchmark.py.
        minutes: for all parts together.
        only: names of `PARTS`.
        rehearse: on the CPU at tiny size.

    Raises:
        ValueError: there is no GPU to use, no clone with tests, no time, or nowhere to write.
        SystemExit: a part has failed, or was cut or stopped; all are printed.
    """
    if not (ROOT / "tests" / "gpu").is_dir():
        raise ValueError(
            f"benchmark.py gpu must run in a clone, whose tests it needs, got {ROOT} as the "
            "package's place; install the clone with pip install -e, or set PYTHONPATH to it."
        )
    if not 0 < minutes <= MOST_MINUTES:
        raise ValueError(f"minutes must be above 0 and at most {MOST_MINUTES}, got {minutes:g}.")
    if not rehearse and not _sees_gpu():
        raise ValueError(
            "benchmark.py gpu needs a GPU, and torch sees none; --rehearse runs all of it on the "
            "CPU at tiny size."
        )
    folder, results = Path(output_dir).absolute(), []
    left = {name: part for name, part in PARTS.items() if name in only}
    end = time.monotonic() + 60 * minutes
    with writing(folder), _interrupted_by_sigterm():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text("")
        while left:
            name = next(iter(left))
            share = left[name].seconds / sum(part.seconds for part in left.values())
            limit = max(0.0, end - time.monotonic()) * share
            part = left.pop(name)
            words = [*part.words, *(part.tiny if rehearse else ())]
            begin = partial(_begin, words, measure, folder / "log.txt", hidden=rehearse)
            results.append({"part": name, **_run(begin, words, limit, folder / "log.txt")})
            print(_described(results[-1]), flush=True)
            with replacing(folder / "results.json") as aside:
                aside.write_text(json.dumps(results, indent=1) + "\n")
            with replacing(folder / "results.md") as aside:
                aside.write_text("\n".join([_summary(results), *map(_described, results)]))
            if results[-1]["status"] == STOPPED:
                break
    if any(result["status"] != DONE for result in results):
        print(_summary(results), flush=True)
        raise SystemExit(1)
    return _summary(results)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Take a scheduler's signal as Ctrl-C, so that the part that runs does not outlive this."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _sees_gpu() -> bool:
    """Whether torch sees a GPU, asked of a process that may use it."""
    asked = FORK.Process(target=lambda: sys.exit(0 if torch.cuda.is_available() else 1))
    asked.start()
    asked.join()
    return asked.exitcode == 0


def _run(
    begin: Callable[[], None], words: Sequence[str], limit: float, log: Path
) -> dict[str, Any]:
    """Run a part for so many seconds at most: what it was, how it ended, and what it found."""
    before, begun = log.stat().st_size, time.monotonic()
    process = FORK.Process(target=begin)
    process.start()
    stopped = False
    try:
        process.join(limit)
    except KeyboardInterrupt:
        stopped = True
    finally:
        cut = process.exitcode is None
        for kill in (lambda: os.killpg(process.pid or 0, signal.SIGKILL), process.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill()  # also what it has started and left
        process.join()
    with log.open("rb") as file:
        file.seek(before)
        text = file.read().decode(errors="replace")
    status = f"failed with status {process.exitcode}" if process.exitcode else DONE
    if cut:
        status = STOPPED if stopped else f"cut after {limit:.0f} s"
    printed, mark, result = text.rpartition(f"{MARK}\n")
    return {
        "command": " ".join(["pytest -m gpu" if words[0][0] == "-" else "benchmark.py", *words]),
        "status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "limit": round(limit, 1),
        "tables": _tables(text),
        "result": result.strip() if mark else None,
        "printed": "\n".join((printed if mark else text).splitlines()[-LAST_LINES:]),
    }


def _begin(words: list[str], measure: Measure, log: Path, *, hidden: bool) -> None:
    """Become a part, whose output is added to the log.

    Args:
        hidden: keep GPUs from it.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    if hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if words[0][0] == "-":
        sys.exit(_check(words))
    result = measure(words)
    print(f"{MARK}\n{result}", flush=True)


class _Report:
    """A plugin of pytest: a line of a table for each check, as soon as it has ended."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)  # pytest captures what is printed
        print(table(["check", "outcome", "seconds"], []), file=self.out)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            row = f"| {name} | {report.outcome} | {report.duration:.1f} |"
            print(f"\n{row}", file=self.out)  # below pytest's dots


def _check(words: list[str]) -> int:
    import pytest

    os.chdir(ROOT)
    own = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60",
           "-W", "ignore:Module already imported"]  # fmt: skip
    return pytest.main([*own, *words, "tests/gpu"], plugins=[_Report()])


def _tables(text: str) -> list[dict[str, Any]]:
    """The header and the rows of each table in a text, also of one that is not finished."""
    found: list[dict[str, Any]] = []
    for line, following in pairwise([*text.splitlines(), ""]):
        cells = line[2:-2].split(" | ")
        if following.startswith("| --- "):
            found.append({"header": cells, "rows": []})
        elif found and line.startswith("| ") and not line.startswith("| --- "):
            found[-1]["rows"].append(cells)
    return found


def _described(result: dict[str, Any]) -> str:
    """A part's heading, and its result or what it printed last."""
    text = result["result"]
    if text is None:
        shown = (table(one["header"], one["rows"]) for one in result["tables"])
        text = "\n\n".join([*shown, f"```\n{result['printed']}\n```"])
    heading = f"## {result['part']}: {result['status']}, {result['seconds']} s"
    return f"\n{heading}\n\n`{result['command']}`\n\n{text}\n"


def _summary(results: Sequence[dict[str, Any]]) -> str:
    rows = [[r["part"], r["status"], f"{r['seconds']:.1f}", f"{r['limit']:.0f}"] for r in results]
    return table(["part", "ended", "seconds", "of at most"], rows)
