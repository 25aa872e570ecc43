"""The settings of extract, and of every command that encodes a data set."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar

from vicreg_hf.hub.api import check_repo_id
from vicreg_hf.settings.base import Count, Settings, Share, WholeFromZero, one_of


@dataclass(frozen=True)
class EncodingSettings(Settings):
    """Which encoder encodes which images, and how many at once."""

    headings: ClassVar[dict[str, str]] = {
        "model": "encoder and data", "batch_size": "speed and precision",
    }  # fmt: skip

    model: str
    """Encoder on the Hub, output_dir of a run, or directory of an encoder."""
    dataset_name: str
    """Hub id, local folder or file, or demo, as for pretrain."""
    _: KW_ONLY
    revision: str | None = None
    """Branch or commit of a model on the Hub."""
    dataset_config_name: str | None = None
    """Configuration of a Hub data set."""
    image_column: str | None = None
    """Column of images; by default the only column of that type."""
    value_range: str | None = None
    """Values that become black and white, as LOW,HIGH, where images have more than 8 bits; by
    default those of the encoder, or else the least and the largest in a sample of the images."""
    batch_size: Count = 256
    """Images that each process encodes at once."""
    bf16: bool = False
    """Encode in bfloat16, about twice as fast on recent GPUs."""
    num_workers: WholeFromZero | None = None
    """Processes that decode images, for each that encodes; by default its share of the cores."""
    max_bad_fraction: Share = 0.05
    """Share of the images, from 0 to 1, that may be unusable; they are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_range()


@dataclass(frozen=True)
class ExtractionArguments(EncodingSettings):
    """Settings of `extract_dataset`."""

    usual: ClassVar[tuple[str, ...]] = (
        "model", "dataset_name", "output_dir", "split", "batch_size", "bf16", "num_workers",
        "features", "push_to_hub", "hub_dataset_id",
    )  # fmt: skip
    headings: ClassVar[dict[str, str]] = EncodingSettings.headings | {
        "output_dir": "features", "push_to_hub": "Hub",
    }  # fmt: skip

    output_dir: str
    """Directory of the features; a run started again there goes on where it stopped."""
    split: str | None = None
    """Name of one split; by default all are encoded."""
    label_column: str | None = None
    """Column of classes to copy; by default the only one, or the one called label."""
    features: Annotated[str, one_of("pooled", "map")] = "pooled"
    """pooled for one vector of an image, map for one of each position of the feature map."""
    dtype: Annotated[str, one_of("float32", "float16")] | None = None
    """float32 or float16: the type of the features that are written; by default float32, and for
    maps float16."""
    rows_per_file: Count | None = None
    """Rows of each parquet file, by default 10,000, and 500 of maps; a stop loses at most these."""
    push_to_hub: bool = False
    """Push the features to the Hub as a data set; access is checked at the start."""
    hub_dataset_id: str | None = None
    """Repository of the data set, org/name; it is made if absent."""
    hub_private: bool = False
    """If the repository is made, make it private."""
    publish_names: bool = False
    """Push the names of files as image_id; by default those of files on this machine are replaced
    by row numbers, and stay in output_dir alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pooled = self.features == "pooled"
        self._fill(
            dtype=self.dtype or ("float32" if pooled else "float16"),
            rows_per_file=self.rows_per_file or (10_000 if pooled else 500),
        )
        if self.hub_dataset_id is not None:
            check_repo_id(self.hub_dataset_id, "hub_dataset_id")
        elif self.push_to_hub:
            raise ValueError("push_to_hub needs hub_dataset_id, org/name, and got none.")
