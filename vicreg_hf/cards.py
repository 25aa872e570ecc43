"""Model cards: what a run knows of itself, and the card rendered from it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg

import vicreg_hf
from vicreg_hf.arguments import PretrainingArguments
from vicreg_hf.backbones import is_ours
from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.evaluation.results import Measurement
from vicreg_hf.opening import DEMO
from vicreg_hf.whole_files import replacing

CARD_FILE = "README.md"
LOSS_PICTURE = "pictures/loss_terms.png"
SPECTRUM_PICTURE = "pictures/singular_values.png"
RETRIEVAL_PICTURE = "pictures/retrievals.png"
PICTURES = (LOSS_PICTURE, SPECTRUM_PICTURE, RETRIEVAL_PICTURE)
MODEL_ID = "org/name"
"""Stands in a card for the repository, until the encoder is pushed to one."""
SECOND = "-prime"
"""What the repository of a second branch's encoder is called after the first's name: timm opens
repositories at their root alone, so each encoder has its own."""
TAGS = ["timm", "vicreg", "self-supervised-learning", "arxiv:2105.04906"]
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


def model_card(
    config: VICRegConfig,
    *,
    num_features: int,
    num_parameters: int | None = None,
    record: TrainingRecord | None = None,
    origin: str | None = None,
    licence: str | None = "mit",
) -> ModelCard:
    """Render the card of an encoder.

    Args:
        num_features: F, width of the pooled output.
        num_parameters: of the encoder.
        record: of the run that made it; without it the card says what the model alone can say.
        origin: a sentence on where the weights are from, where no run made them.
        licence: of the weights; weights that a run started from have the last word.

    Returns:
        The card; `MODEL_ID` stands in it for the repository.
    """
    base, licence = (None, licence) if record is None else _base_model(record, licence)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=licence,
        tags=TAGS,
        base_model=base,
        **_results(record),
    )
    return _rendered(
        data, config.architecture, record,
        kind="timm", pretrained_cfg=config.pretrained_cfg, num_features=num_features,
        num_parameters=num_parameters, model_id=MODEL_ID, origin=origin,
        branches=None if record is None else branches(config, record.args),
        own_branch="the first", spectrogram=config.spectrogram, started_from=base,
    )  # fmt: skip


def second_card(
    config: VICRegConfig,
    *,
    num_features: int,
    num_parameters: int,
    record: TrainingRecord,
    loader: tuple[str, str] = ("", ""),
) -> ModelCard:
    """Render the card of the second branch's encoder; other arguments as for `model_card`.

    Its repository is `MODEL_ID` followed by `SECOND`.

    Args:
        loader: of text, the class of transformers that loads it, and what to call on the result.
    """
    prime = config.prime
    assert prime is not None
    kind = "timm" if prime["encoder_config"] is None else prime["modality"]
    start = str(record.args.prime_architecture or record.args.architecture)
    base = None
    if record.args.prime_pretrained:
        cfg = get_pretrained_cfg(start) if kind == "timm" else None
        base = f"timm/{start}" if cfg is not None else str(impersonal(start))
    licence = "mit" if base is None else "other"
    pipeline = "image-feature-extraction" if kind == "timm" else "feature-extraction"
    data = ModelCardData(
        library_name="transformers", pipeline_tag=pipeline, license=licence,
        tags=TAGS if kind == "timm" else TAGS[1:],
        base_model=base if base is not None and not os.path.exists(start) else None,
    )  # fmt: skip
    quiet = replace(record, results=(), pictures=())  # what was measured is of the first
    return _rendered(
        data, prime["architecture"], quiet,
        kind=kind, pretrained_cfg=prime["pretrained_cfg"], num_features=num_features,
        num_parameters=num_parameters, model_id=MODEL_ID + SECOND, origin=None,
        branches=branches(config, record.args), own_branch="the second", started_from=base,
        loader=loader[0], loaded_part=loader[1], max_length=record.args.prime_max_length,
        spectrogram=prime["preparation"] if prime["modality"] == "audio" else None,
    )  # fmt: skip


def _rendered(
    data: ModelCardData,
    architecture: str,
    record: TrainingRecord | None,
    *,
    num_parameters: int | None,
    pretrained_cfg: Mapping[str, Any] | None,
    **facts: Any,
) -> ModelCard:
    subject = f"VICReg {architecture}"
    if record is not None:
        subject += f" on {record.hub_id or impersonal(record.args.dataset_name)}"
    parameters = f"{num_parameters / 1e6:.3g} million parameters, " if num_parameters else ""
    return ModelCard.from_template(
        data,
        template_path=str(_template()),
        title=subject,
        architecture=architecture,
        parameters=parameters,
        input_size=None if pretrained_cfg is None else pretrained_cfg["input_size"],
        record=record,
        needs_import=is_ours(architecture),
        licence_text=_licence_text(data.license),
        **facts,
    )


@dataclass(frozen=True)
class BranchFacts:
    """A line of a card's table of branches."""

    name: str
    place: str
    """Its directory of the run, and its repository."""
    takes: str
    encoder: str
    expander: str


def branches(config: VICRegConfig, args: PretrainingArguments) -> list[BranchFacts] | None:
    """Which branch is which; None where they share their weights."""
    prime = config.prime
    if prime is None:
        return None
    first = "spectrograms" if config.spectrogram else "images"
    column = f"column `{args.prime_column}`"
    takes = {
        "image": f"images of {column}" if args.prime_column else "the second view of each image",
        "text": f"texts of {column}",
        "audio": f"{'waveforms' if prime['encoder_config'] else 'spectrograms'} of {column}",
        "embedding": f"precomputed embeddings of {column}",
    }
    return [
        BranchFacts(
            "the first", f"`encoder`, `{MODEL_ID}`", f"the first view of {first}"
            + (", and further ones" if args.num_views > 2 else ""),
            config.architecture, "-".join(map(str, config.expander_dims)),
        ),
        BranchFacts(
            "the second",
            "not published" if prime["modality"] == "embedding"
            else f"`encoder_prime`, `{MODEL_ID}{SECOND}`",
            takes[prime["modality"]], prime["architecture"] or "none",
            "-".join(map(str, prime["expander_dims"])),
        ),
    ]  # fmt: skip


def personalise(text: str, repo_id: str, licence: str | None = None) -> str:
    """A card with the repository's id, and its licence if one is given."""
    if licence is not None:
        card: Any = ModelCard(text, ignore_metadata_errors=True)
        card.text = card.text.replace(_licence_text(card.data.license), _licence_text(licence))
        card.data.license = licence
        text = str(card)
    return re.sub(rf'(["/:`]){re.escape(MODEL_ID)}\b', lambda found: found[1] + repo_id, text)


def add_evaluation(
    path: Path, measurements: Sequence[Measurement], *, dataset: str, split: str
) -> None:
    """Add results of an evaluation to a card, in the place of earlier ones of the same data.

    Args:
        path: of the card.
        dataset: id on the Hub, or a name; likewise split.

    Raises:
        ValueError, YAMLError: metadata that cannot be read, which would be lost.
    """
    card: Any = ModelCard(path.read_text(encoding="utf-8"))
    shares = [m for m in measurements if m.percent]
    kept = [
        result for result in card.data.eval_results or []
        if (result.dataset_name, result.dataset_split) != (dataset, split)
        or result.metric_name not in {m.name for m in shares}
    ]  # fmt: skip
    if shares:
        card.data.model_name = card.data.model_name or path.resolve().parent.name
        card.data.eval_results = kept + [
            EvalResult(
                task_type="image-classification", dataset_type=dataset, dataset_name=dataset,
                dataset_split=split, metric_type=_metric_type(m.name), metric_name=m.name,
                metric_value=round(100 * m.value, 2),
            )
            for m in shares
        ]  # fmt: skip
        types = {_metric_type(m.name) for m in shares} | set(card.data.metrics or [])
        card.data.metrics = sorted(types)
    card.text = _with_section(card.text, dataset, split, measurements)
    write_card(path, card)


def write_card(path: Path, card: ModelCard) -> None:
    """Write a card that is there whole or, after a crash, not at all."""
    with replacing(path) as aside:
        aside.write_text(str(card), encoding="utf-8")


def _metric_type(name: str) -> str:
    kinds = {"recall": "recall", "precision": "mean_average_precision"}
    return next((kind for word, kind in kinds.items() if word in name), "accuracy")


def _with_section(text: str, dataset: str, split: str, measurements: Sequence[Measurement]) -> str:
    """A card's text with a table for one data set, before its training or at its end."""
    begin, end = f"<!-- evaluation: {dataset} ({split}) -->", "<!-- end of evaluation -->"
    rows = {m.name: f"| {m.name} | {m.shown} | {m.num_images:,} |" for m in measurements}
    if begin in text and end not in text.partition(begin)[2]:
        raise ValueError(f"a card's table must end with {end}, got none after {begin}.")
    if begin in text:
        before, _, rest = text.partition(begin)
        old, _, after = rest.partition(end)
        earlier = [line for line in old.splitlines() if line.startswith("| ")][1:]
        rows = {line.split("|")[1].strip(): line for line in earlier} | rows
    else:
        place = text.find("\n## Training\n") + 1 or len(text)
        before, after = text[:place].rstrip() + "\n\n", "\n\n" + text[place:].lstrip()
    lines = [
        begin, f"## Evaluation on {dataset} ({split})", "",
        "| measure | value, 95 % interval over resampled images | images |", "|---|---|---|",
        *rows.values(), end,
    ]  # fmt: skip
    return before + "\n".join(lines) + after


def _base_model(record: TrainingRecord, licence: str | None) -> tuple[str | None, str | None]:
    """The repository whose weights training started from, and the licence that follows."""
    if not record.args.pretrained:
        return None, licence
    cfg = get_pretrained_cfg(record.args.architecture)
    if cfg is None:
        return None, "other"
    tag = f".{cfg.tag}" if cfg.tag and "." not in record.args.architecture else ""
    hub_id = cfg.hf_hub_id if cfg.hf_hub_id and cfg.hf_hub_id != "timm/" else None
    return hub_id or f"timm/{record.args.architecture}{tag}", cfg.license or "other"


def _results(record: TrainingRecord | None) -> Mapping[str, Any]:
    """The metadata that the Hub reads of a run."""
    if record is None:
        return {}
    hub_id = record.hub_id
    found: dict[str, Any] = {} if hub_id is None else {"datasets": [hub_id]}
    accuracies = [result for result in record.results if result.of_model and result.percent]
    if accuracies:
        name = hub_id or str(impersonal(record.args.dataset_name))
        found["metrics"] = ["accuracy"]
        found["model_name"] = f"VICReg {record.args.architecture}"
        found["eval_results"] = [
            EvalResult(
                task_type="image-classification", dataset_type=name, dataset_name=name,
                dataset_split=record.args.eval_split, metric_type="accuracy",
                metric_name=result.name, metric_value=round(100 * result.value, 2),
            )
            for result in accuracies
        ]  # fmt: skip
    return found


def _licence_text(licence: str | None) -> str:
    if licence is None:
        return "That of the checkpoint the weights are from."
    return (
        f"The weights are published under: {licence}. The images they were trained on keep their "
        "own terms."
    )


def _template() -> Path:
    """In a wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "model_cards" / "template.md.jinja"
    return inside if inside.is_file() else package.parent / "model_cards" / "template.md.jinja"
