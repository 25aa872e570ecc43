"""The record of a run for its card: what made the encoder, on what, and what was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vicreg_hf.runtime.machine import software

LOCAL_SETTINGS = {
    "output_dir", "resume", "report_to", "push_to_hub", "hub_model_id", "hub_private",
}  # fmt: skip
"""Settings that do not influence the model, and are not in its card."""


@dataclass(frozen=True)
class Result:
    """A measurement."""

    name: str
    value: float
    measured: str
    """How it was measured, in a few words."""
    percent: bool = False
    of_model: bool = True
    """False for a value that the model is compared with, which stays out of the metadata."""

    @property
    def shown(self) -> str:
        return f"{100 * self.value:.1f} %" if self.percent else f"{self.value:.3g}"


@dataclass(frozen=True)
class Picture:
    """A picture beside the card."""

    file: str
    caption: str


@dataclass(frozen=True)
class TrainingRecord:
    """The facts of a run that its card tells."""

    args: Mapping[str, Any]
    """Every setting of the run by its name."""
    num_views: int
    """Views of each image."""
    data: str
    """The data set, as a sentence names it."""
    hub_id: str | None
    """The id of the data set if it is on the Hub."""
    images: int | None
    """None for a stream of unknown length."""
    steps: int
    seconds: float
    """The time that all sessions of the run took together."""
    hardware: str
    results: Sequence[Result]
    pictures: Sequence[Picture] = ()

    @property
    def views(self) -> int:
        return self.num_views * self.steps * self.args["batch_size"]

    @property
    def settings_yaml(self) -> str:
        settings = {key: value for key, value in self.args.items() if key not in LOCAL_SETTINGS}
        return yaml.safe_dump(impersonal(settings), sort_keys=False, allow_unicode=True)

    @property
    def wall_time(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"

    @property
    def software(self) -> str:
        versions = software("vicreg_hf", "torch", "timm", "transformers")
        return ", ".join(f"{name} {version}" for name, version in versions.items())


def impersonal(value: Any) -> Any:
    """The value with every path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {key: impersonal(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [impersonal(entry) for entry in value]
    if isinstance(value, str) and (
        value.startswith(("/", "~", "../", "./")) or (os.sep in value and os.path.exists(value))
    ):
        return Path(value).resolve().name
    return value
