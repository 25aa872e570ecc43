"""The settings of every script that encodes a data set with a trained encoder."""

from __future__ import annotations

from dataclasses import dataclass

from vicreg_hf.settings.base import REQUIRED, Count, Settings, Share, WholeFromZero, setting


@dataclass(frozen=True, kw_only=True)
class EncodingSettings(Settings):
    """Which encoder encodes which images, and how many at once."""

    model: str = setting(
        REQUIRED,
        "Encoder on the Hub, output_dir of a run, or directory of an encoder.",
        kw_only=False,
    )
    dataset_name: str = setting(
        REQUIRED, "Hub id, local folder or file, or demo, as for pretrain.py.", kw_only=False
    )
    revision: str | None = setting(None, "Branch or commit of a model on the Hub.")
    dataset_config_name: str | None = setting(None, "Configuration of a Hub data set.")
    image_column: str | None = setting(None, "Column of images; by default the only one.")
    batch_size: Count = setting(256, "Images that each process encodes at once.")
    bf16: bool = setting(False, "Encode in bfloat16, about twice as fast on recent GPUs.")
    num_workers: WholeFromZero | None = setting(
        None, "Processes that decode images, per process that encodes; by default by the cores."
    )
    max_bad_fraction: Share = setting(
        0.05, "Share of the images, from 0 to 1, that may be unusable; they are left out."
    )
