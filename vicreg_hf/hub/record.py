"""What a run knows of itself: what made its encoder, on what, and what was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from vicreg_hf.runtime.machine import software

WHERE_ONLY = {"output_dir", "resume", "push_to_hub", "hub_model_id", "hub_private"}
"""Settings that say nothing of how the model was made."""


@dataclass(frozen=True)
class Result:
    """A measurement."""

    name: str
    value: float
    measured: str
    """How, in a few words."""
    percent: bool = False
    of_model: bool = True
    """And not of what it is compared with, which stays out of the metadata."""

    @property
    def shown(self) -> str:
        return f"{100 * self.value:.1f} %" if self.percent else f"{self.value:.3g}"


@dataclass(frozen=True)
class Picture:
    """A picture beside the card."""

    file: str
    caption: str


class RunSettings(Protocol):
    """The settings of a run that its card reads; all others are listed there as they are."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    architecture: str
    pretrained: bool
    dataset_name: str
    eval_split: str | None
    batch_size: int
    prime_architecture: str | None
    prime_pretrained: bool
    prime_column: str | None
    prime_max_length: int | None

    @property
    def num_views(self) -> int: ...


@dataclass(frozen=True)
class TrainingRecord:
    """What a run knows of itself."""

    args: RunSettings
    data: str
    """The data set, as a sentence names it."""
    hub_id: str | None
    """The data set on the Hub, if it is one."""
    images: int | None
    """None for a stream of unknown length."""
    steps: int
    seconds: float
    """Of all the sessions of the run together."""
    hardware: str
    results: Sequence[Result]
    pictures: Sequence[Picture] = ()
    energy: str | None = None
    held_out: str | None = None

    @property
    def views(self) -> int:
        return self.args.num_views * self.steps * self.args.batch_size

    @property
    def settings(self) -> dict[str, Any]:
        given = {k: v for k, v in asdict(self.args).items() if k not in WHERE_ONLY}
        return impersonal(given)

    @property
    def settings_yaml(self) -> str:
        return yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)

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
