"""What a billion images ask for: listing them, ordering them, finding a row.

Measured at sizes that take seconds, and scaled to 10^9 in proportion.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from datasets.data_files import resolve_pattern

from vicreg_hf.benchmarks.measuring import memory_process, peak_extra_mib, surroundings, table
from vicreg_hf.runtime.randomness import permutation

CPU = torch.device("cpu")
BILLION = 10**9
IN_A_FOLDER = 1000
"""Files."""
BATCH = 2048
"""Rows."""
CELL_BYTES = 1000
"""Of the rows among which one is found."""
HEADER = ["", "at", "seconds", "MiB", "at 10^9", "seconds", "GiB"]


def billion(num_files: int, num_rows: int) -> str:
    """A table: time and memory of each, measured and in proportion for 10^9.

    Args:
        num_files: empty files that are listed.
        num_rows: whose order is drawn; of a tenth an Arrow table is opened.
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, memory_process() as pool:
        _make_files(Path(folder) / "files", num_files)
        rows = num_rows // 10
        _make_table(f"{folder}/table", rows)
        parts: list[tuple[str, int, Callable[..., tuple[float, float]], tuple[object, ...]]] = [
            ("listing files, os.scandir", num_files, _scan, (f"{folder}/files",)),
            ("resolving files, datasets", num_files, _resolve, (f"{folder}/files",)),
            ("order of an epoch, permutation", num_rows, _order, (num_rows,)),
        ]
        lines = []
        for name, size, function, args in parts:
            seconds, mib = pool.submit(function, *args).result()
            scaled = BILLION / size
            lines.append(
                [name, f"{size:,}", f"{seconds:.2f}", f"{mib:.0f}", "",
                 f"{seconds * scaled:.0f}", f"{mib * scaled / 1024:.1f}"]
            )  # fmt: skip
        opening, reading = pool.submit(_read, f"{folder}/table", rows).result()
    notes = [
        f"opening an Arrow table of {rows:,} rows of {CELL_BYTES} bytes: {1000 * opening:.1f} ms; "
        f"reading {BATCH} of them at random: {1000 * reading:.1f} ms",
    ]
    return "\n".join([surroundings(CPU), "", table(HEADER, lines), "", *notes])


def _measured(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and MiB at the peak."""
    took = []
    peak = peak_extra_mib(lambda: took.append(_once(run)), CPU)
    return took[0], float("nan") if peak is None else peak


def _scan(folder: str) -> tuple[float, float]:
    def names() -> list[str]:
        return [file.path for part in os.scandir(folder) for file in os.scandir(part.path)]

    return _measured(names)


def _resolve(folder: str) -> tuple[float, float]:
    return _measured(lambda: resolve_pattern("**", folder))


def _order(size: int) -> tuple[float, float]:
    return _measured(lambda: permutation(size, seed=0, epoch=0))


def _read(folder: str, size: int) -> tuple[float, float]:
    """Seconds of opening a table, and of reading a batch at random."""
    opened = datasets.load_from_disk(folder)
    rows = permutation(size, seed=0, epoch=0)[:BATCH].tolist()
    return _seconds(lambda: datasets.load_from_disk(folder)), _seconds(lambda: opened[rows])


def _make_files(folder: Path, count: int) -> None:
    for start in range(0, count, IN_A_FOLDER):
        part = folder / f"{start // IN_A_FOLDER:06d}"
        part.mkdir(parents=True)
        for number in range(start, min(start + IN_A_FOLDER, count)):
            (part / f"{number:010d}.jpg").touch()


def _make_table(folder: str, size: int) -> None:
    cells = [bytes(CELL_BYTES)] * size
    datasets.Dataset.from_dict({"image": cells}).save_to_disk(folder)


def _once(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of ten."""
    return min(_once(run) for _ in range(10))
