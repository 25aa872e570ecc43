"""The settings of every script that encodes a data set with a trained encoder."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from vicreg_hf.settings.base import Count, Settings, Share, WholeFromZero


@dataclass(frozen=True)
class EncodingSettings(Settings):
    """Which encoder encodes which images, and how many at once."""

    model: str
    """Encoder on the Hub, output_dir of a run, or directory of an encoder."""
    dataset_name: str
    """Hub id, local folder or file, or demo, as for pretrain.py."""
    _: KW_ONLY
    revision: str | None = None
    """Branch or commit of a model on the Hub."""
    dataset_config_name: str | None = None
    """Configuration of a Hub data set."""
    image_column: str | None = None
    """Column of images; by default the only column of that type."""
    batch_size: Count = 256
    """Images that each process encodes at once."""
    bf16: bool = False
    """Encode in bfloat16, about twice as fast on recent GPUs."""
    num_workers: WholeFromZero | None = None
    """Processes that decode images, for each that encodes; by default its share of the cores."""
    max_bad_fraction: Share = 0.05
    """Share of the images, from 0 to 1, that may be unusable; they are left out."""
