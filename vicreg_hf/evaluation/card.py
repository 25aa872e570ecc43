"""Results of evaluations in a model's card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.hub.card import write_card

TASKS = {"segmentation": "image-segmentation"}
"""What the Hub calls the task of a protocol, where it is not classification."""


def add_evaluation(
    path: Path, measurements: Sequence[Measurement], *, dataset: str, split: str
) -> None:
    """Add results of an evaluation to a card. They replace those of the same data.

    Args:
        path: the card's.
        dataset: id on the Hub, or a name.

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
                task_type=TASKS.get(m.protocol, "image-classification"), dataset_type=dataset,
                dataset_name=dataset, dataset_split=split, metric_type=_metric_type(m.name),
                metric_name=m.name, metric_value=round(100 * m.value, 2),
            )
            for m in shares
        ]  # fmt: skip
        types = {_metric_type(m.name) for m in shares} | set(card.data.metrics or [])
        card.data.metrics = sorted(types)
    card.text = _with_section(card.text, dataset, split, measurements)
    write_card(path, card)


def _metric_type(name: str) -> str:
    kinds = {"recall": "recall", "precision": "mean_average_precision", "mIoU": "mean_iou"}
    return next((kind for word, kind in kinds.items() if word in name), "accuracy")


def _with_section(text: str, dataset: str, split: str, measurements: Sequence[Measurement]) -> str:
    """A card's text with a table for one data set, before its training or at its end."""
    begin, end = f"<!-- evaluation: {dataset} ({split}) -->", "<!-- end of evaluation -->"
    rows = {m.name: f"| {m.name} | {m.shown} | {m.num_images:,} |" for m in measurements}
    before, found, rest = text.partition(begin)
    if found:
        table, ended, after = rest.partition(end)
        if not ended:
            raise ValueError(f"a card's table must end with {end}, got none after {begin}.")
        lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
        rows = {line.split("|")[1].strip(): line for line in lines} | rows
    else:
        place = text.find("\n## Training\n") + 1 or len(text)
        before, after = text[:place].rstrip() + "\n\n", "\n\n" + text[place:].lstrip()
    section = [
        begin, f"## Evaluation on {dataset} ({split})", "",
        "| measure | value, 95 % interval | images |", "|---|---|---|",
        *rows.values(), end,
    ]  # fmt: skip
    return before + "\n".join(section) + after
