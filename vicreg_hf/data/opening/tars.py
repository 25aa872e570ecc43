"""WebDataset tars: files of one name are a sample, and files of one kind a column.

`datasets` takes the endings in the first five samples of the first tar for the columns of all, and
a name for ended at its first dot.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import combinations, groupby, islice
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import builder as builders
from datasets import config
from datasets.features.features import cast_to_python_objects, generate_from_arrow_type
from datasets.filesystems import EXTENSION_TO_COMPRESSION_FS_FILE_CLS
from datasets.packaged_modules.webdataset.webdataset import WebDataset, text_loads
from datasets.utils.file_utils import is_local_path

from vicreg_hf.data.columns.finding import LABEL
from vicreg_hf.data.opening.folders import IMAGES, SOUNDS
from vicreg_hf.runtime.console import warn

PEEKED = 100
"""Files of a tar whose names are looked at, where all names cannot be had without its content."""
TYPED, TARS_TYPED = 5, 16
"""Samples of a tar, and tars all over a data set, from which columns get their types."""
SIMPLE = {None: "binary", int: "int64", text_loads: "string"}
"""Types of fields by what decodes them; those of others are found from values."""
Key = getattr(builders, "Key", "{}_{}".format)  # older releases have plain text
CLASSES = {"cls", "cls2", "class", LABEL}
"""Fields that hold classes."""


class Layout(NamedTuple):
    """How the files of tars become columns."""

    dotted: frozenset[str]
    """Fields with dots in them, such as seg.png; otherwise a field is what follows the last dot."""
    columns: dict[str, str]
    """The column of each field."""
    media: dict[str, Any]
    """The columns of images and sounds, of which a sample has one at least, and their features."""


def load_dataset(path: str, name: str | None = None, *, streaming: bool, **options: Any) -> Any:
    """Open what `datasets.load_dataset` does, but tars as this module says.

    Args:
        **options: as for `datasets.load_dataset`.
    """
    builder = datasets.load_dataset_builder(path, name, **options)
    if isinstance(builder, WebDataset):  # not from the cache that `datasets` would fill otherwise
        options["cache_dir"] = f"{options.get('cache_dir') or config.HF_DATASETS_CACHE}/tars"
        builder = datasets.load_dataset_builder(path, name, **options)
        builder.__class__ = Tars
    if streaming:
        loaded: Any = builder.as_streaming_dataset()
    else:
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    if isinstance(builder, Tars):
        for sentence in builder.info.description.splitlines():
            warn(sentence)
    return loaded


class Tars(WebDataset):
    """The builder, which keeps in its description what is to be said of the tars."""

    def _split_generators(self, dl_manager: Any) -> Any:
        splits = {
            split: {"tar_paths": paths, "tar_iterators": [*map(dl_manager.iter_archive, paths)]}
            for split, paths in dl_manager.download(self.config.data_files).items()
        }
        tars = [each for split in splits.values() for each in zip(*split.values(), strict=True)]
        if not all(is_local_path(path) for path, _ in tars):  # each costs a connection
            tars = [tars[0], tars[-1]]
        survey = _Survey(tars)
        self.layout = survey.layout(self.info.features)
        self.info.features = self.info.features or self._features(tars, survey)
        self.info.description = "\n".join(survey.sentences(self.layout))
        return [datasets.SplitGenerator(name=n, gen_kwargs=each) for n, each in splits.items()]

    def _features(self, tars: list[Any], survey: _Survey) -> datasets.Features:
        values: dict[str, list[Any]] = {}
        for _, files in tars[:: max(1, len(tars) // TARS_TYPED)]:
            for sample in islice(self._samples(files), TYPED):
                for column, value in sample.items():
                    values.setdefault(column, []).append(value)
        features = datasets.Features()
        for column in dict.fromkeys(self.layout.columns[field] for field in survey.fields):
            if column in self.layout.media:
                features[column] = self.layout.media[column]
                continue
            decoder = self.DECODERS.get(column.lower().rpartition(".")[2])
            if decoder in SIMPLE:
                features[column] = datasets.Value(SIMPLE[decoder])
            elif column in values:
                found = cast_to_python_objects(values[column], only_1d_for_numpy=True)
                with suppress(pa.ArrowException):  # they are of several types
                    features[column] = generate_from_arrow_type(pa.array(found).type)
        text = datasets.Value("string")
        return datasets.Features({**features, "__key__": text, "__url__": text})

    def _samples(self, files: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        """The values of one sample after the other, by column; images and sounds with their path.

        A second image for a column begins another sample, which shares what is no image.
        """
        dotted, columns, media = self.layout
        key, sample = None, {}
        for path, file in files:
            name, field = _part(path, dotted) or (None, "")
            column = columns.get(field) or _only(media, field)
            if name is None or column is None:
                continue
            if name != key or (column in media and column in sample):
                if sample and (not media or media.keys() & sample.keys()):
                    yield sample
                kept = sample if name == key else {}
                key, sample = name, {c: v for c, v in kept.items() if c not in media}
                sample["__key__"] = key
            content = self._content(field, file)
            sample[column] = {"path": path, "bytes": content} if column in media else content
        if sample and (not media or media.keys() & sample.keys()):
            yield sample

    def _content(self, field: str, file: Any) -> Any:
        stem, _, ending = field.lower().rpartition(".")
        packed: Any = EXTENSION_TO_COMPRESSION_FS_FILE_CLS.get(f".{ending}")
        if packed is not None:
            file, ending = packed(file, mode="rb"), stem.rpartition(".")[2]
        content = file.read()
        return self.DECODERS[ending](content) if ending in self.DECODERS else content

    def _generate_examples(self, tar_paths: Any, tar_iterators: Any) -> Iterator[Any]:
        assert self.info.features is not None
        schema, media = self.info.features.arrow_schema, self.layout.media
        for tar, (path, files) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            for number, sample in enumerate(self._samples(files)):
                sample["__url__"] = path
                values = {name: sample.get(name) for name in schema.names}
                yield (
                    Key(tar, number),
                    {
                        name: value if name in media else _fitting(value, schema.field(name).type)
                        for name, value in values.items()
                    },
                )


class _Survey:
    """The names of the files in tars."""

    def __init__(self, tars: Iterable[tuple[str, Any]]) -> None:
        self.groups: Counter[tuple[str, ...]] = Counter()
        """What follows the first dot of the names that are alike before it."""
        self.folders: dict[str, None] = {}
        self.first: dict[tuple[str, ...], str] = {}
        self.whole = True
        for path, files in tars:
            named = (each for name in self._names(path, files) if (each := _at_first_dot(name)))
            for key, group in groupby(named, key=lambda each: each[0]):
                rests = tuple(rest for _, rest in group)
                self.groups[rests] += 1
                self.first.setdefault(rests, f"{key}.{rests[0]} in {path}")
                if any(map(_kind, rests)):
                    self.folders[key.rpartition("/")[0]] = None
        self.dotted = frozenset(self._find_dotted())
        self.samples: Counter[tuple[str, ...]] = Counter()
        for rests, count in self.groups.items():
            parted = [_part(f"x.{rest}", self.dotted) or ("", "") for rest in rests]
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
        self.whole = False
        with suppress(Exception):  # damage, which reading says
            yield from islice((name for name, _ in files), PEEKED)

    def _find_dotted(self) -> Iterator[str]:
        """The fields with dots: they are in most samples, where parts of a name are in one."""
        total, counts = self.groups.total(), Counter[str]()
        for rests, count in self.groups.items():
            counts.update(dict.fromkeys((rest for rest in rests if "." in rest), count))
        most = [rest for rest, count in counts.items() if 2 * count >= max(4, total)]
        for rest in most:
            words = all(part.isidentifier() for part in rest.split(".")[:-1])
            if words or total >= 4 * len(most):  # months and running numbers are many
                yield rest

    def layout(self, declared: Mapping[str, Any] | None) -> Layout:
        """The columns: images are one, unless most of the rarer sort stand beside the others."""
        together: Counter[Any] = Counter()
        for fields, count in self.samples.items():
            together.update(dict.fromkeys(map(frozenset, combinations(fields, 2)), count))
        columns: dict[str, str] = {}
        members: dict[str, list[str]] = {}
        odd = int(self.samples.total() > 3)  # one sample does not decide for all
        for field, count in self.fields.most_common():
            kind, columns[field] = _kind(field), field
            for column, others in members.items():
                alike = _kind(column) is kind and _prefix(column) == _prefix(field)
                if alike and all(
                    together[frozenset((field, other))]
                    <= max(odd, min(count, self.fields[other]) / 2)
                    for other in others
                ):
                    columns[field] = column
                    break
            if kind is not None:
                members.setdefault(columns[field], []).append(field)
        media = {column: kind.feature for column in members if (kind := _kind(column))}
        if declared:
            media = {
                n: f for n, f in declared.items() if isinstance(f, (datasets.Image, datasets.Audio))
            }
            own = {f: f if f in declared else column for f, column in columns.items()}
            columns = {f: column for f, column in own.items() if column in declared}
        return Layout(self.dotted, columns, media)

    def sentences(self, layout: Layout) -> Iterator[str]:
        """A sentence on each sort of what is not read."""
        alone = {rests: count for rests, count in self.groups.items() if not any(map(_kind, rests))}
        if layout.media and self.whole and alone:
            yield (
                f"{sum(alone.values())} files in tars, or groups of one name, are left out, as no "
                f"image or sound of that name stands beside them: {self.first[next(iter(alone))]} "
                "is the first."
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


def _part(path: str, dotted: frozenset[str]) -> tuple[str, str] | None:
    """The name of the sample that a file is of, and the field; None where it has neither."""
    parted = _at_first_dot(path)
    if parted is None or "." not in parted[1] or parted[1] in dotted:
        return parted
    key, _, field = path.rpartition(".")
    return (key, field) if field else None


def _prefix(field: str) -> str:
    return field.rpartition(".")[0]


def _kind(field: str) -> Any:
    """The sort of media that a field is, by its ending."""
    ending = "." + field.rpartition(".")[2].lower()
    return next((kind for kind in (IMAGES, SOUNDS) if ending in kind.suffixes), None)


def _only(media: Mapping[str, Any], field: str) -> str | None:
    """The column of a field that was not seen at first: the only one of that kind."""
    kind = _kind(field)
    found = [name for name, each in media.items() if kind and type(each) is type(kind.feature)]
    return found[0] if len(found) == 1 else None


def _fitting(value: Any, kind: Any) -> Any:
    """A value of JSON, or None where it is of another type than those seen at first."""
    if not isinstance(value, (dict, list)):
        return value
    try:
        pa.array([value], kind)
    except pa.ArrowException:
        return None
    return value
