"""The settings of scripts/extract_features.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vicreg_hf.hub.api import check_repo_id
from vicreg_hf.settings.base import Count, one_of
from vicreg_hf.settings.encoding import EncodingSettings


@dataclass(frozen=True)
class ExtractionArguments(EncodingSettings):
    """Settings of `extract_dataset`."""

    output_dir: str
    """Directory of the features; a run started again there goes on where it stopped."""
    split: str | None = None
    """Name of one split; by default all are encoded."""
    label_column: str | None = None
    """Column of classes to copy; by default the only one, or the one called label."""
    dtype: Annotated[str, one_of("float32", "float16")] = "float32"
    """float32 or float16: the type of the features that are written."""
    rows_per_file: Count = 10_000
    """Rows of each parquet file; a stop loses at most these."""
    push_to_hub: bool = False
    """Push the features to the Hub as a data set; access is checked at the start."""
    hub_dataset_id: str | None = None
    """Repository of the data set, org/name; it is made if absent."""
    hub_private: bool = False
    """If the repository is made, make it private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_dataset_id is not None:
            check_repo_id(self.hub_dataset_id, "hub_dataset_id")
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_dataset_id, org/name, and got none.")
