"""Model cards, rendered from what a run knows of itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.hub.export import EncoderModel
from vicreg_hf.hub.layout import PRIME_DIRECTORY
from vicreg_hf.hub.record import TrainingRecord, impersonal, starting_terms
from vicreg_hf.models.resnets import is_ours
from vicreg_hf.runtime.files import replacing

CARD_FILE = "README.md"
LOSS_PICTURE = "pictures/loss_terms.png"
SPECTRUM_PICTURE = "pictures/singular_values.png"
RETRIEVAL_PICTURE = "pictures/retrievals.png"
MAPS_PICTURE = "pictures/feature_maps.png"
PICTURES = (LOSS_PICTURE, SPECTRUM_PICTURE, RETRIEVAL_PICTURE, MAPS_PICTURE)
PHOTOGRAPHS = (RETRIEVAL_PICTURE, MAPS_PICTURE)
"""Pictures that show images of the data, which are published on request alone."""
MODEL_ID = "org/name"
"""The placeholder in a card for its repository, until the encoder is pushed to one."""
PRIME_SUFFIX = "-prime"
"""The name of the second encoder's repository ends with this after the first's name. Each encoder
has its own repository, because timm opens repositories at their root only."""
TEMPLATE = "model_cards/template.md.jinja"
TAGS = ["timm", "vicreg", "self-supervised-learning", "arxiv:2105.04906"]


def model_card(
    model: EncoderModel,
    *,
    record: TrainingRecord | None = None,
    origin: str | None = None,
    licence: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """Render the card of an encoder; `MODEL_ID` stands in it for the repository.

    Args:
        record: of the run that made it; without it the card says what the model alone can say.
        origin: a sentence on where the weights are from, if no run made them.
        licence: of the weights, if no run made them; that of a run's follows from its record.
        base_model: the repository that training started from, likewise.
    """
    config, base = model.config, base_model
    if record is not None:
        base, licence = starting_terms(record.args, record.starts)
    data = _metadata(license=licence, base_model=base, **_results(record))
    if record is not None and base is None:
        base = record.starts.get("init_from", {}).get("name")
    return _render(
        data, config.architecture, record, model.encoder, kind="timm", model_id=MODEL_ID,
        pretrained_cfg=config.pretrained_cfg, num_features=model.num_features, origin=origin,
        branches=None if record is None else branches(config, record),
        own_branch="the first", spectrogram=config.spectrogram, started_from=base,
        value_range=config.value_range,
    )  # fmt: skip


def second_card(
    config: VICRegConfig,
    *,
    encoder: nn.Module,
    num_features: int,
    record: TrainingRecord,
    loader: tuple[str, str] = ("", ""),
) -> ModelCard:
    """Render the card of the second branch's encoder.

    Its repository is `MODEL_ID` followed by `PRIME_SUFFIX`.

    Args:
        config: of the model with both branches.
        num_features: F, the width of the second encoder's output.
        loader: the class of transformers that loads an encoder of texts, and the call that takes
            the encoder from the loaded model.
    """
    prime = config.prime
    assert prime is not None
    kind = "timm" if prime["encoder_config"] is None else prime["modality"]
    base, licence = starting_terms(record.args, record.starts, prime=True)
    data = _metadata(license=licence, base_model=base)
    if base is None and record.args["prime_pretrained"]:
        base = str(impersonal(record.args["prime_architecture"]))  # a directory
    base = base or record.starts.get("prime_init_from", {}).get("name")
    if kind != "timm":
        data.pipeline_tag, data.tags = "feature-extraction", TAGS[1:]
    of_the_run = replace(record, results=(), pictures=())  # they were measured on the first
    return _render(
        data, prime["architecture"], of_the_run, encoder, kind=kind,
        model_id=MODEL_ID + PRIME_SUFFIX, pretrained_cfg=prime["pretrained_cfg"],
        num_features=num_features, branches=branches(config, record), own_branch="the second",
        started_from=base, loader=loader[0], loaded_part=loader[1],
        max_length=record.args["prime_max_length"],
        spectrogram=prime["preparation"] if prime["modality"] == "audio" else None,
        value_range=(prime["preparation"] or {}).get("value_range"),
    )  # fmt: skip


def _metadata(**facts: Any) -> ModelCardData:
    return ModelCardData(
        library_name="transformers", pipeline_tag="image-feature-extraction", tags=TAGS, **facts
    )


def _render(
    data: ModelCardData,
    architecture: str,
    record: TrainingRecord | None,
    encoder: nn.Module,
    **facts: Any,
) -> ModelCard:
    subject = f"VICReg {architecture}"
    if record is not None:
        subject += f" on {record.hub_id or impersonal(record.args['dataset_name'])}"
    # in a wheel the template is inside the package, in a checkout beside it
    package = Path(__file__).parents[1]
    inside = package / TEMPLATE
    return ModelCard.from_template(
        data, template_path=str(inside if inside.is_file() else package.parent / TEMPLATE),
        title=subject, architecture=architecture, record=record,
        parameters=f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.3g}",
        needs_import=is_ours(architecture), licence_text=_licence_text(data.license), **facts,
    )  # fmt: skip


def branches(config: VICRegConfig, record: TrainingRecord) -> list[list[str]] | None:
    """The rows of a card's table of branches; None if both branches share their weights.

    The columns are: branch, directory and repository, what it takes, encoder, expander.
    """
    prime = config.prime
    if prime is None:
        return None
    name, modality = record.args["prime_column"], prime["modality"]
    column = f"column `{name}`"
    takes = {
        "image": f"images of {column}" if name else "the second view of each image",
        "text": f"texts of {column}",
        "audio": f"{'waveforms' if prime['encoder_config'] else 'spectrograms'} of {column}",
        "embedding": f"precomputed embeddings of {column}",
    }
    first = f"the first view of {'spectrograms' if config.spectrogram else 'images'}"
    place = f"`{PRIME_DIRECTORY}`, `{MODEL_ID}{PRIME_SUFFIX}`"
    return [
        ["the first", f"`encoder`, `{MODEL_ID}`",
         first + (", and further ones" if record.num_views > 2 else ""), config.architecture,
         "-".join(map(str, config.expander_dims))],
        ["the second", "not published" if modality == "embedding" else place, takes[modality],
         prime["architecture"] or "none", "-".join(map(str, prime["expander_dims"]))],
    ]  # fmt: skip


def personalise(text: str, repo_id: str, licence: str | None = None) -> str:
    """A card with the repository's id, and its licence if one is given."""
    if licence is not None:
        card: Any = ModelCard(text, ignore_metadata_errors=True)
        card.text = card.text.replace(_licence_text(card.data.license), _licence_text(licence))
        card.data.license = licence
        text = str(card)
    return re.sub(rf'(["/:`]){re.escape(MODEL_ID)}\b', lambda found: found[1] + repo_id, text)


def without_photographs(text: str) -> str:
    """A card without the pictures that show images of the data, also if it was edited by hand.

    Wherever such a picture's file is named, the image or link goes, or else the line; and a caption
    below goes too, which is the next paragraph, if it is all in italics.
    """
    for name in PHOTOGRAPHS:
        file = re.escape(name.rpartition("/")[2])
        for named in (
            rf"<(figure|picture)\b(?:(?!</?\1\b).)*?{file}.*?</\1>",
            rf"<(?:img|source)\b[^>]*{file}[^>]*>",
            rf"!?\[[^\[\]]*\]\([^()]*{file}[^()]*\)",
            rf"^.*{file}.*\n?",
        ):
            flags = re.MULTILINE if named.startswith("^") else re.DOTALL
            text = re.sub(named, "\0", text, flags=flags)
        kept: list[str] = []
        gone = False
        for paragraph in text.split("\n\n"):
            left = paragraph.replace("\0", "")
            caption = gone and re.fullmatch(r"\s*([*_])(?!\1).*\1\s*", paragraph, re.DOTALL)
            gone = left != paragraph and not left.strip()
            if not gone and not caption:
                kept.append(left)
        text = "\n\n".join(kept)
    return text


def write_card(path: Path, card: ModelCard) -> None:
    """Write a card that is there whole or, after a crash, not at all."""
    with replacing(path) as aside:
        aside.write_text(str(card), encoding="utf-8")


def _results(record: TrainingRecord | None) -> dict[str, Any]:
    """The metadata of a run that the Hub reads."""
    if record is None:
        return {}
    data, split = record.hub_id or str(impersonal(record.args["dataset_name"])), ""
    if record.args.get("monitor_dataset_name") is not None:
        data, split = str(impersonal(record.args["monitor_dataset_name"])), "monitor_"
    measured = record.args[f"{split}eval_split"] or record.args.get(f"{split}train_split")
    metadata: dict[str, Any] = {} if record.hub_id is None else {"datasets": [record.hub_id]}
    evaluations = [
        EvalResult(
            task_type="image-classification", dataset_type=data, dataset_name=data,
            dataset_split=measured, metric_type="accuracy",
            metric_name=result.name, metric_value=round(100 * result.value, 2),
        )
        for result in record.results if result.of_model and result.percent
    ]  # fmt: skip
    if evaluations:
        metadata |= {
            "metrics": ["accuracy"], "eval_results": evaluations,
            "model_name": f"VICReg {record.args['architecture']}",
        }  # fmt: skip
    return metadata


def _licence_text(licence: str | None) -> str:
    if licence is None:
        return (
            "No licence has been chosen for these weights. If they come from other weights, the "
            "terms of those hold; else ask their owner before you use them."
        )
    return (
        f"The weights are published under: {licence}. The images they were trained on keep their "
        "own terms."
    )
