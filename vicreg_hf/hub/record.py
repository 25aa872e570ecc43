"""The record of a run for its card: what made the encoder, on what, and what was measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.models import get_pretrained_cfg

from vicreg_hf.runtime.machine import software

LOCAL_SETTINGS = {
    "output_dir", "resume", "report_to", "push_to_hub", "hub_model_id", "hub_private",
    "publish_images", "license",
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
    """Optimiser steps behind the weights."""
    seconds: float
    """The time that all sessions of the run took together."""
    hardware: str
    results: Sequence[Result]
    pictures: Sequence[Picture] = ()
    choice: str | None = None
    """A phrase that says which step's weights these are and why, where not just the last's."""
    starts: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the encoders that the run started from, by setting; see `Source.facts`."""
    loss: str | None = None
    """Qualified name of a loss in place of VICReg's."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many images were found that could not be used, by the reason."""
    not_opened: Mapping[str, int] = field(default_factory=dict)
    """How many files beside those images were left out when the data were opened, likewise."""

    @property
    def verdict(self) -> str | None:
        """A sentence on how good the encoder is; None where nothing was measured."""
        best = next((r for r in self.results if r.of_model and r.percent), None)
        if best is None:
            rank = next((r for r in self.results if "rank" in r.name), None)
            return rank and (
                f"**{rank.name.capitalize()}: {rank.shown}**, measured without labels, so that no "
                "accuracy is known; 1 is collapse."
            )
        others = [
            f"{r.name.removeprefix(best.name).strip(', ')} {r.shown}"
            for r in self.results if not r.of_model and r.name.startswith(best.name)
        ]  # fmt: skip
        compared = f" ({', '.join(others)})" if others else ""
        where = re.sub(r"^\d+-NN accuracy ", "", best.measured)
        return f"**{best.name}: {best.shown}**{compared} {where}."

    @property
    def top(self) -> Picture | None:
        """The picture that tells the most, which is the last."""
        return self.pictures[-1] if self.pictures else None

    @property
    def usage(self) -> str:
        """A phrase on how many images were used, and how many were left out and why."""
        number = sum(self.left_out.values())
        seen = self.steps * self.args["batch_size"]
        if self.images is not None and seen >= self.images:
            used = f"{self.images - number:,} were used" if number else "all were used"
        else:
            used = f"{seen:,} were seen"
        if number:
            used += f", {number:,} left out ({_reasons(self.left_out)})"
        if self.not_opened:
            used += f"; files left out beside them: {_reasons(self.not_opened)}"
        return used

    @property
    def views(self) -> int:
        return self.num_views * self.steps * self.args["batch_size"]

    @property
    def settings_yaml(self) -> str:
        shown = {k: start["name"] for k, start in self.starts.items() if self.args.get(k)}
        settings = {**self.args, **shown}
        settings = {key: value for key, value in settings.items() if key not in LOCAL_SETTINGS}
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


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} as {why}" for why, count in counts.items())


def starting_terms(
    settings: Mapping[str, Any],
    starts: Mapping[str, Any] | None,
    *,
    prime: bool = False,
) -> tuple[str | None, str | None]:
    """The repository whose weights a run started from, and the licence that follows.

    A licence that the settings choose precedes it. None is a licence that nobody states.

    Args:
        settings: of the run, by name.
        starts: facts of what it started from, by setting; see `Source.facts`.
        prime: of the second branch.
    """
    base, licence = _starting_terms(settings, starts, prime)
    return base, settings.get("license") or licence


def _starting_terms(
    settings: Mapping[str, Any], starts: Mapping[str, Any] | None, prime: bool
) -> tuple[str | None, str | None]:
    start = (starts or {}).get("prime_init_from" if prime else "init_from")
    if start is not None:
        return start["base_model"], start["license"]
    if not settings.get("prime_pretrained" if prime else "pretrained"):
        return None, None
    architecture = str((prime and settings["prime_architecture"]) or settings["architecture"])
    if prime:
        known = timm.is_model(architecture.partition(".")[0])
        base = f"timm/{architecture}" if known else str(impersonal(architecture))
        return None if os.path.exists(architecture) else base, None
    cfg = get_pretrained_cfg(architecture)
    if cfg is None:
        return None, None
    tag = f".{cfg.tag}" if cfg.tag and "." not in architecture else ""
    hub_id = cfg.hf_hub_id if cfg.hf_hub_id != "timm/" else None
    return hub_id or f"timm/{architecture}{tag}", cfg.license


def impersonal(value: Any) -> Any:
    """The value with every path of this machine cut to its last part."""
    if isinstance(value, dict):
        return {key: impersonal(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [impersonal(entry) for entry in value]
    if isinstance(value, str) and value.startswith("local-dir:"):
        return Path(value.removeprefix("local-dir:")).resolve().name
    if isinstance(value, str) and (
        value.startswith(("/", "~", "../", "./")) or (os.sep in value and os.path.exists(value))
    ):
        return Path(value).resolve().name
    return value
