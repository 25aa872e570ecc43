"""The settings of scripts/extract_features.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vicreg_hf.hub.api import check_repo_id
from vicreg_hf.runtime.checks import settle_kinds


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class ExtractionArguments:
    """Settings of `extract_dataset`."""

    model: str = field(
        metadata={"help": "Encoder on the Hub, output_dir of a run, or directory of an encoder."}
    )
    dataset_name: str = field(metadata={"help": "As for pretrain.py: Hub id, folder or file."})
    output_dir: str = field(metadata={"help": "Where the features go; started again, it goes on."})
    dataset_config_name: str | None = _setting(None, "Configuration of a Hub data set.")
    split: str | None = _setting(None, "One split; by default all.")
    image_column: str | None = _setting(None, "Column of images; found by its type if only one.")
    label_column: str | None = _setting(
        None, "Column of classes to copy; by default the only one, or label."
    )
    revision: str | None = _setting(None, "Branch or commit of a model on the Hub.")
    batch_size: int = _setting(256, "Images at once in each process.")
    bf16: bool = _setting(False, "Compute in bfloat16; about twice as fast on recent hardware.")
    dtype: str = _setting("float32", "float32 or float16, of the features that are written.")
    rows_per_file: int = _setting(10_000, "Rows of a parquet file; a stop loses at most these.")
    num_workers: int | None = _setting(None, "Image-decoding workers per process.")
    max_bad_fraction: float = _setting(0.05, "Share of images that may be unusable; left out.")
    push_to_hub: bool = _setting(False, "Push the features as a data set; checked at the start.")
    hub_dataset_id: str | None = _setting(None, "Where to: org/name, made if absent.")
    hub_private: bool = _setting(False, "Make the repository private, if it is made.")

    def __post_init__(self) -> None:
        settle_kinds(self)
        for name in ("batch_size", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be float32 or float16, got {self.dtype!r}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"max_bad_fraction must lie between 0 and 1, got {self.max_bad_fraction}."
            )
        if self.hub_dataset_id is not None:
            check_repo_id(self.hub_dataset_id, "hub_dataset_id")
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_dataset_id, org/name, and got none.")
