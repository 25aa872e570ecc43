"""From the names of the files in tars to samples and columns.

Files of one name are a sample of WebDataset, and files of one kind a column.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import combinations, groupby, islice
from typing import Any, NamedTuple

import datasets
from datasets.utils.file_utils import is_local_path

from vicreg_hf.data.columns.finding import LABEL
from vicreg_hf.data.opening.folders import IMAGES, SOUNDS

PEEKED = 100
"""Files of a tar whose names are looked at, where all names cannot be had without its content."""
CLASSES = {"cls", "cls2", "class", LABEL}
"""Fields that hold classes."""


class Layout(NamedTuple):
    """How the files of tars become columns."""

    dotted_fields: frozenset[str]
    """Fields with dots in them, such as seg.png; otherwise a field is what follows the last dot."""
    columns: dict[str, str]
    """The column of each field."""
    media: dict[str, Any]
    """The columns of images and sounds, of which a sample has one at least, and their features."""


class Survey:
    """The names of the files in tars."""

    def __init__(self, tars: Iterable[tuple[str, Any]], *, all_names_read: bool) -> None:
        self.counts_by_endings: Counter[tuple[str, ...]] = Counter()
        """The number of samples by the endings, from the first dot on, of their files."""
        self.folders: dict[str, None] = {}
        """The folders that hold images or sounds."""
        self.first_files: dict[tuple[str, ...], str] = {}
        """A file, and its tar, by the endings of the sample that it is of."""
        self.all_names_read = all_names_read
        for path, files in tars:
            named = (each for name in self._names(path, files) if (each := _at_first_dot(name)))
            for key, group in groupby(named, key=lambda each: each[0]):
                rests = tuple(rest for _, rest in group)
                self.counts_by_endings[rests] += 1
                self.first_files.setdefault(rests, f"{key}.{rests[0]} in {path}")
                if any(map(kind_of, rests)):
                    self.folders[key.rpartition("/")[0]] = None
        self.dotted_fields = frozenset(self._find_dotted())
        self.samples: Counter[tuple[str, ...]] = Counter()
        for rests, count in self.counts_by_endings.items():
            parted = [part_name(f"x.{rest}", self.dotted_fields) or ("", "") for rest in rests]
            for _, group in groupby(parted, key=lambda each: each[0]):
                self.samples[tuple(dict.fromkeys(field for _, field in group))] += count
        self.fields: Counter[str] = Counter()
        for fields, count in self.samples.items():
            self.fields.update(dict.fromkeys(fields, count))

    def _names(self, path: str, files: Iterable[tuple[str, Any]]) -> Iterator[str]:
        if is_local_path(path):
            try:
                tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
            except tarfile.ReadError:  # it is compressed as a whole
                pass
            else:
                with tar:
                    for entry in tar:
                        tar.members = []  # pyright: ignore - tarfile remembers every one
                        if entry.isreg() and not entry.name.rpartition("/")[2].startswith("__"):
                            yield entry.name
                return
        self.all_names_read = False
        with suppress(Exception):  # damage, which reading says
            yield from islice((name for name, _ in files), PEEKED)

    def _find_dotted(self) -> Iterator[str]:
        """The fields with dots: they are in most samples, where parts of a name are in one."""
        total, counts = self.counts_by_endings.total(), Counter[str]()
        for rests, count in self.counts_by_endings.items():
            counts.update(dict.fromkeys((rest for rest in rests if "." in rest), count))
        most = [rest for rest, count in counts.items() if 2 * count >= max(4, total)]
        for rest in most:
            words = all(part.isidentifier() for part in rest.split(".")[:-1])
            if words or total >= 4 * len(most):  # months and running numbers are many
                yield rest

    def layout(self, declared: Mapping[str, Any] | None) -> Layout:
        """Find the columns.

        Images share a column, unless most samples with the rarer field have the other one, too.
        """
        together: Counter[Any] = Counter()
        for fields, count in self.samples.items():
            together.update(dict.fromkeys(map(frozenset, combinations(fields, 2)), count))
        columns: dict[str, str] = {}
        members: dict[str, list[str]] = {}
        odd = int(self.samples.total() > 3)  # one sample does not decide for all
        for field, count in self.fields.most_common():
            kind, columns[field] = kind_of(field), field
            for column, others in members.items():
                alike = kind_of(column) is kind and _prefix(column) == _prefix(field)
                if alike and all(
                    together[frozenset((field, other))]
                    <= max(odd, min(count, self.fields[other]) / 2)
                    for other in others
                ):
                    columns[field] = column
                    break
            if kind is not None:
                members.setdefault(columns[field], []).append(field)
        media = {column: kind.feature for column in members if (kind := kind_of(column))}
        if declared:
            media = {
                n: f for n, f in declared.items() if isinstance(f, (datasets.Image, datasets.Audio))
            }
            own = {f: f if f in declared else column for f, column in columns.items()}
            columns = {f: column for f, column in own.items() if column in declared}
        return Layout(self.dotted_fields, columns, media)

    def sentences(self, layout: Layout) -> Iterator[str]:
        """A sentence on each sort of what is not read."""
        alone = {
            rests: count
            for rests, count in self.counts_by_endings.items()
            if not any(map(kind_of, rests))
        }
        if layout.media and self.all_names_read and alone:
            first = self.first_files[next(iter(alone))]
            yield (
                f"{sum(alone.values())} files in tars, or groups of one name, are left out, as no "
                f"image or sound of that name stands beside them: {first} is the first."
            )
        if len(self.folders) > 1 and not CLASSES & set(layout.columns.values()):
            one = max(self.folders).removeprefix("./")
            yield (
                f"the {len(self.folders)} folders in tars, as {one}, are not read as classes; to "
                "have labels, unpack the tars, or pack a zip in their place."
            )


def _at_first_dot(path: str) -> tuple[str, str] | None:
    folder, slash, name = path.rpartition("/")
    stem, _, rest = name.partition(".")
    return (folder + slash + stem, rest) if stem and rest else None


def part_name(path: str, dotted_fields: frozenset[str]) -> tuple[str, str] | None:
    """Part a path into its sample's name and its field; None where it has not both."""
    parted = _at_first_dot(path)
    if parted is None or "." not in parted[1] or parted[1] in dotted_fields:
        return parted
    key, _, field = path.rpartition(".")
    return (key, field) if field else None


def _prefix(field: str) -> str:
    return field.rpartition(".")[0]


def kind_of(field: str) -> Any:
    """The sort of media that a field is, by its ending."""
    ending = "." + field.rpartition(".")[2].lower()
    return next((kind for kind in (IMAGES, SOUNDS) if ending in kind.suffixes), None)


def only_column(media: Mapping[str, Any], field: str) -> str | None:
    """Find the column of a field that was not seen at first, if just one is of its kind."""
    kind = kind_of(field)
    found = [name for name, each in media.items() if kind and type(each) is type(kind.feature)]
    return found[0] if len(found) == 1 else None
