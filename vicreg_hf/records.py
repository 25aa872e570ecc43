"""What a run knows of itself: what made its encoder, on what, and what was measured."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import yaml

import vicreg_hf
from vicreg_hf.arguments import PretrainingArguments
from vicreg_hf.opening import DEMO

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


@dataclass(frozen=True)
class TrainingRecord:
    """What a run knows of itself."""

    args: PretrainingArguments
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
    def hub_id(self) -> str | None:
        """The data set on the Hub, if it is one."""
        name = self.args.dataset_name
        return None if name == DEMO or os.path.exists(name) else name

    @property
    def data(self) -> str:
        if self.args.dataset_name == DEMO:
            return "`demo`, scikit-learn's handwritten digits at random places and angles"
        if self.hub_id is not None:
            return f"[{self.hub_id}](https://huggingface.co/datasets/{self.hub_id})"
        return f"the local data set `{impersonal(self.args.dataset_name)}`"

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
        versions = {
            "vicreg_hf": vicreg_hf.__version__, "torch": torch.__version__,
            "timm": timm.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
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


def hardware(device: torch.device, processes: int) -> str:
    """The machine, as a card names it."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}, {processes} process{'es' if processes > 1 else ''}"
