"""WebDataset tars as splits: `datasets` reads them, with the columns that `tar_names` finds.

`datasets` itself takes the endings in the first five samples of the first tar for the columns of
all tars, and lets a name end at its first dot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa
from datasets import builder as builders
from datasets import config
from datasets.features.features import cast_to_python_objects, generate_from_arrow_type
from datasets.filesystems import EXTENSION_TO_COMPRESSION_FS_FILE_CLS
from datasets.packaged_modules.webdataset.webdataset import WebDataset, text_loads
from datasets.utils.file_utils import is_local_path

from vicreg_hf.data.opening.tar_names import Survey, only_column, part_name
from vicreg_hf.runtime.console import warn

TYPED, TARS_TYPED = 5, 16
"""Samples of a tar, and tars all over a data set, from which columns get their types."""
SOUGHT = 500
"""Samples in all that are looked at where the first ones do not tell the type of a column."""
TYPES_BY_DECODER = {None: "binary", int: "int64", text_loads: "string"}
"""The types of fields by the function that decodes them; all others get theirs from values."""
CACHE = "tars-1"
"""The folder of the cache; its number goes up when the rules of this module change."""
Key = getattr(builders, "Key", "{}_{}".format)  # older releases have plain text


def load_dataset(
    path: str, name: str | None = None, *, streaming: bool, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """Open what `datasets.load_dataset` does, but tars as this module says.

    Args:
        **options: as for `datasets.load_dataset`.

    Returns:
        the splits, and the files of each.

    Raises:
        ValueError: a file in a tar that does not hold what its ending says.
    """
    builder = datasets.load_dataset_builder(path, name, **options)
    if isinstance(builder, WebDataset):  # not from the cache that `datasets` would fill otherwise
        cache = f"{options.get('cache_dir') or config.HF_DATASETS_CACHE}/{CACHE}"
        # features that are found in the cache would be taken for declared ones
        options["cache_dir"] = f"{cache}-streams" if streaming else cache
        builder = datasets.load_dataset_builder(path, name, **options)
        builder.__class__ = Tars
        vars(builder)["reads_once"] = not streaming
    if streaming:
        loaded: Any = builder.as_streaming_dataset()
    else:
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    if isinstance(builder, Tars):
        for sentence in builder.info.description.splitlines():
            warn(sentence)
    return loaded, builder.config.data_files or {}


class Tars(WebDataset):
    """The builder, which keeps in its description what is to be said of the tars."""

    reads_once: bool
    """Whether all is copied to the cache, and not read anew by every process."""
    told = False
    """Whether this process has told of lost values, when streaming."""
    lost: Counter[str]
    """How many values had no place in their columns, by the field and the key in it."""
    first_lost: str

    def _split_generators(self, dl_manager: Any) -> Any:
        splits = {
            split: {"tar_paths": paths, "tar_iterators": [*map(dl_manager.iter_archive, paths)]}
            for split, paths in dl_manager.download(self.config.data_files).items()
        }
        tars = [each for split in splits.values() for each in zip(*split.values(), strict=True)]
        number = len(tars)
        if not all(is_local_path(path) for path, _ in tars):  # each costs a connection
            tars = [tars[0], tars[-1]]
        elif not self.reads_once:  # each process and start reads the headers
            tars = [*tars[: -1 : max(1, -(-len(tars) // TARS_TYPED))], tars[-1]]
        survey = Survey(tars, all_names_read=len(tars) >= number)
        self.declared = self.info.features is not None
        self.layout = survey.layout(self.info.features)
        self.info.features = self.info.features or self._features(tars, survey)
        self.info.description = "\n".join(survey.sentences(self.layout))
        return [datasets.SplitGenerator(name=n, gen_kwargs=each) for n, each in splits.items()]

    def _features(self, tars: list[Any], survey: Survey) -> datasets.Features:
        columns = dict.fromkeys(self.layout.columns[field] for field in survey.fields)
        values: dict[str, list[Any]] = {
            column: []
            for column in columns
            if column not in self.layout.media and self._decoder(column) not in TYPES_BY_DECODER
        }
        unknown = list(values)
        self.lost, self.first_lost = Counter(), ""
        looked_at = tars[:: max(1, len(tars) // TARS_TYPED)]
        for path, files in looked_at:
            most = max(TYPED, SOUGHT // len(looked_at))
            for number, sample in enumerate(islice(self._samples(path, files), most)):
                if number >= TYPED:
                    unknown = [c for c in unknown if _holds_null(_type_of(values[c]))]
                    if not unknown:
                        break
                for column in values.keys() & sample.keys() if number < TYPED else unknown:
                    longer = [*values[column], sample.get(column)]
                    if number < TYPED or _type_of(longer) != _type_of(values[column]):
                        values[column] = longer
        features = datasets.Features()
        for column in columns:
            if column in self.layout.media:
                features[column] = self.layout.media[column]
            elif column not in values:
                features[column] = datasets.Value(TYPES_BY_DECODER[self._decoder(column)])
            elif values[column]:
                features[column] = generate_from_arrow_type(_type_of(values[column]))
        text = datasets.Value("string")
        return datasets.Features({**features, "__key__": text, "__url__": text})

    def _decoder(self, column: str) -> Any:
        return self.DECODERS.get(column.lower().rpartition(".")[2])

    def _samples(self, tar: str, files: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the values of each sample by column; images and sounds come with their path.

        A second image for a column begins another sample, which shares what is no image.
        """
        dotted_fields, columns, media = self.layout
        key, sample = None, {}
        for path, file in files:
            name, field = part_name(path, dotted_fields) or (None, "")
            column = columns.get(field) or only_column(media, field)
            if name is None or column is None:
                if name is not None and not self.declared:
                    self._lose(field, name, tar)
                continue
            if name != key or (column in media and column in sample):
                if sample and (not media or media.keys() & sample.keys()):
                    yield sample
                kept = sample if name == key else {}
                key, sample = name, {c: v for c, v in kept.items() if c not in media}
                sample["__key__"] = key
            content = self._content(field, file, f"{path} in {tar}")
            sample[column] = {"path": path, "bytes": content} if column in media else content
        if sample and (not media or media.keys() & sample.keys()):
            yield sample

    def _lose(self, value: str, sample: str, tar: str) -> None:
        self.lost[value] += 1
        self.first_lost = self.first_lost or f"{value} of the sample {sample} in {tar}"

    def _sentence_on_lost(self) -> str:
        number = self.lost.total() if self.reads_once else "some"
        return (
            f"{number} values in tars are not read, as they are of other types than in the samples "
            "that columns got their types from, or were in none of these: "
            f"{self.first_lost} is the first; give each field one type and the same keys in all "
            "samples."
        )

    def _content(self, field: str, file: Any, place: str) -> Any:
        stem, _, ending = field.lower().rpartition(".")
        packed: Any = EXTENSION_TO_COMPRESSION_FS_FILE_CLS.get(f".{ending}")
        if packed is not None:
            file, ending = packed(file, mode="rb"), stem.rpartition(".")[2]
        content = file.read()
        if ending not in self.DECODERS:
            return content
        try:
            return self.DECODERS[ending](content)
        except Exception as error:  # decoders raise whatever their parsing meets
            raise ValueError(
                f"a file in a tar must hold what its ending says, and {place} does not: {error}; "
                "mend it, leave it out, or give files of that sort another ending."
            ) from None

    def _generate_examples(self, tar_paths: Any, tar_iterators: Any) -> Iterator[Any]:
        assert self.info.features is not None
        schema, media = self.info.features.arrow_schema, self.layout.media
        self.lost, self.first_lost = Counter(), ""
        typed = {
            name: schema.field(name).type
            for name in schema.names
            if name not in media and self._decoder(name) not in TYPES_BY_DECODER
        }
        for tar, (path, files) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            for number, sample in enumerate(self._samples(path, files)):
                sample["__url__"] = path
                for name in sample:
                    if name not in schema.names and not self.declared:
                        self._lose(name, sample["__key__"], path)
                values = {name: sample.get(name) for name in schema.names}
                for name, kind in typed.items():
                    if self.declared and not isinstance(values[name], (dict, list)):
                        continue  # such as the name of a class, which `datasets` encodes
                    unread: list[str] = []
                    values[name] = _fitting(values[name], kind, name, unread)
                    for each in unread:
                        self._lose(each, sample["__key__"], path)
                if self.lost and not (self.reads_once or self.told):
                    self.told = True
                    warn(self._sentence_on_lost())
                yield Key(tar, number), values
        if self.lost and self.reads_once:
            said = self.info.description.splitlines()
            self.info.description = "\n".join([*said, self._sentence_on_lost()])


def _type_of(values: list[Any]) -> Any:
    """The Arrow type of values, or of the first that has one where they are of several types."""
    try:
        return pa.array(cast_to_python_objects(values, only_1d_for_numpy=True)).type
    except (pa.ArrowException, OverflowError):
        kinds = (_type_of([each]) for each in values if len(values) > 1)
        return next((kind for kind in kinds if not pa.types.is_null(kind)), pa.null())


def _holds_null(kind: Any) -> bool:
    """Whether an Arrow type, or a part of it, is not known yet."""
    parts = (kind.field(k).type for k in range(kind.num_fields))
    return pa.types.is_null(kind) or any(map(_holds_null, parts))


def _fitting(value: Any, kind: Any, name: str, unread: list[str]) -> Any:
    """A value of JSON with None for each part that is not of the column's type.

    Args:
        unread: gets the names of these parts.
    """
    if isinstance(value, dict) and pa.types.is_struct(kind):
        parts = {each.name: each.type for each in kind}
        unread += [f"{name}.{k}" for k, v in value.items() if k not in parts and v is not None]
        return {k: _fitting(value.get(k), parts[k], f"{name}.{k}", unread) for k in parts}
    if isinstance(value, list) and pa.types.is_list(kind):
        return [_fitting(each, kind.value_type, name, unread) for each in value]
    if isinstance(value, (dict, list, str, int, float)):
        try:
            pa.array([value], kind)
        except (pa.ArrowException, OverflowError):
            unread.append(name)
            return None
    return value
