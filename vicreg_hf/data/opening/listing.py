"""The files in a folder or zip, and a sentence on each sort of what is left out of them."""

from __future__ import annotations

import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from vicreg_hf.data.columns.reading import IN_ZIP, ZIP, files_in_zip, zip_and_name
from vicreg_hf.runtime.files import native_path, utf8_path

SYSTEM = frozenset({
    "@eadir", ".thumbnails", "@__thumb", ".@__thumb", "#recycle", "@recycle", "$recycle.bin",
    "#snapshot", "system volume information", "lost+found",
})  # fmt: skip
"""Folders in which file systems, network drives and viewers keep what is theirs."""
WHY_SYSTEM = "are taken for thumbnails or the system's"
OUTPUTS = ({"config.yaml", "metrics.jsonl"}, {"config.yaml", "checkpoints"},
           {"results.json", "report.html"})  # fmt: skip
"""Sets of names, of which the folder of a run or of an evaluation holds one."""
TEXT_AND_TABLES = frozenset({
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xml", ".md", ".rst", ".yaml", ".yml",
    ".toml", ".html", ".htm", ".pdf", ".py", ".sh", ".ipynb", ".ini", ".cfg", ".log", ".db",
    ".lock", ".bib", ".cff", ".caption", ".md5", ".sha256", ".lnk", ".url", ".zip",
})  # fmt: skip
"""Endings of captions, annotations and descriptions, which nobody takes for images or sounds."""
NO_ENDING = frozenset({"license", "licence", "readme", "copying", "notice", "makefile"})
ARRAYS = frozenset({".npy", ".npz", ".dcm", ".mat", ".h5", ".hdf5", ".nii", ".nii.gz"})
"""Endings of files of arrays, which are no images before one says what is in them."""
SHOWN = 5
"""How many endings a sentence names."""
_LEFT_OUT: ContextVar[Counter[str] | None] = ContextVar("left_out", default=None)


@contextmanager
def counting_left_out() -> Iterator[Counter[str]]:
    """Count the files that are left out where data are opened in this block, by the reason."""
    token = _LEFT_OUT.set(found := Counter())
    try:
        yield found
    finally:
        _LEFT_OUT.reset(token)


def count_left_out(number: int, why: str) -> None:
    """Note that files are left out, "as" what a clause says that names no file and no path."""
    if (counts := _LEFT_OUT.get()) is not None:
        counts[why] += number


class Listing(NamedTuple):
    """The files in a folder or zip."""

    files: list[str]
    """Paths, sorted."""
    passed_over: bool = False
    """Whether folders of these files were left out, but for hidden ones."""


def list_folder(folder: str, warn: Callable[[str], object]) -> Listing:
    """List the files at any depth.

    Like `datasets`, leaves out what is hidden or called __something, and follows links. Leaves
    out folders of the system and outputs of earlier runs, too.

    Args:
        warn: called with a sentence on folders that are left out, but for hidden ones.
    """
    found: list[str] = []
    seen: set[str] = set()
    left: dict[str, list[str]] = defaultdict(list)

    def unreadable(error: OSError) -> None:
        left[f"cannot be read ({error.strerror})"].append(str(error.filename))

    for place, folders, names in os.walk(native_path(folder), onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # also a link back to where it stands
            left["are other names of folders that are read already"].append(place)
            folders.clear()
            continue
        seen.add(real)
        if len(seen) > 1 and any(each <= {*names, *folders} for each in OUTPUTS):
            left["hold outputs of earlier runs"].append(place)
            folders.clear()
            continue
        paths = {name: os.path.join(place, name) for name in folders}
        left[WHY_SYSTEM] += [paths[name] for name in sorted(folders) if _is_of_system(name)]
        # a folder before the links to it
        folders[:] = sorted(
            filter(_is_seen, folders), key=lambda name: (os.path.islink(paths[name]), name)
        )
        found += [utf8_path(os.path.join(place, name)) for name in names if name[0] != "."]
    return Listing(sorted(found), _tell(left, folder, warn))


def list_zip(archive: str, warn: Callable[[str], object]) -> list[str]:
    """List the files in a zip, which stays as it is, sorted; leaves out what is not a data set's.

    Raises:
        ValueError: it is damaged, or no zip.
    """
    try:
        with zipfile.ZipFile(native_path(archive)) as opened:
            names = files_in_zip(opened)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"an archive must be whole, and {archive} is not: {error}; get it once more."
        ) from error
    left: dict[str, list[str]] = {WHY_SYSTEM: []}
    found = []
    for name in names:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts:  # the entry is the folder itself
            continue
        *folders, file = parts
        if all(map(_is_seen, folders)) and file[0] != ".":
            found.append(f"{ZIP}{name}{IN_ZIP}{archive}")
        elif any(map(_is_of_system, folders)):
            depth = next(k for k, part in enumerate(folders, 1) if _is_of_system(part))
            left[WHY_SYSTEM].append("/".join(folders[:depth]))
    left[WHY_SYSTEM] = sorted(set(left[WHY_SYSTEM]))
    _tell(left, archive, warn)
    return sorted(found)


def describe_endings(files: Iterable[str]) -> tuple[int, str]:
    """How many files have endings of neither text nor tables, and these endings, for a sentence."""
    counts = Counter(
        suffix for file in files
        if (suffix := suffix_of(file)) not in TEXT_AND_TABLES
        and (suffix or os.path.basename(file).lower() not in NO_ENDING)
    )  # fmt: skip
    shown = [f"{count} {name or 'without one'}" for name, count in counts.most_common(SHOWN)]
    if (rest := sum(counts.values()) - sum(count for _, count in counts.most_common(SHOWN))) > 0:
        shown.append(f"{rest} with others")
    return sum(counts.values()), ", ".join(shown)


def hold_arrays(files: Sequence[str]) -> bool:
    """Whether most files are arrays, apart from text and tables."""
    rest = [suffix for file in files if (suffix := suffix_of(file)) not in TEXT_AND_TABLES]
    return 2 * sum(suffix in ARRAYS for suffix in rest) > len(rest)


def suffix_of(path: str) -> str:
    """The ending of a file, which may lie in a zip, in small letters."""
    stem, suffix = os.path.splitext(zip_and_name(path)[1].lower())
    return ".nii.gz" if suffix == ".gz" and stem.endswith(".nii") else suffix


def _is_of_system(name: str) -> bool:
    return name.lower() in SYSTEM or (name.startswith("__") and name != "__pycache__")


def _is_seen(name: str) -> bool:
    return not name.startswith((".", "__")) and name.lower() not in SYSTEM


def _tell(left: dict[str, list[str]], place: str, warn: Callable[[str], object]) -> bool:
    left = {why: folders for why, folders in left.items() if folders}
    for why, folders in left.items():
        warn(
            f"folders in {place} that {why} are left out, {len(folders)} in all: {folders[0]} is "
            "the first."
        )
    return bool(left)
