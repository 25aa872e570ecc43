"""What a run says of itself when it begins and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicreg_hf.hub.record import Result, impersonal
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.monitoring.knn import KNNMonitor


def introduction(
    args: PretrainingArguments,
    *,
    parameters: int,
    images: int | None,
    step: int,
    total_steps: int,
    hardware: str,
) -> str:
    """What a run says when it begins: what is trained, on what, for how long, where it goes.

    Args:
        parameters: of the backbone.
        images: in the training split, or None where a stream does not say.
        step: from which it goes on.
    """
    data = impersonal(args.dataset_name)
    of = f"the stream {data}" if images is None else f"{images:,} images of {data}"
    whole = f"{total_steps:,} steps" if total_steps > 1 else "1 step"
    steps = whole if step == 0 else f"steps {step + 1:,} to {total_steps:,}"
    if step == total_steps:
        steps = f"none of {whole} left"
    return (
        f"Pretraining {args.architecture} ({parameters / 1e6:.3g} million parameters, expander "
        f"{args.expander_dims}) on {of}, {args.image_size} pixels: {steps}, {args.batch_size:,} "
        f"images each, on {hardware}, into {args.output_dir}."
    )


def summary(
    encoder: Path,
    rows: list[dict[str, Any]],
    monitor: KNNMonitor | None,
    *,
    second: Path | None = None,
) -> str:
    """The last lines of a run: where the encoder is, how to load it, how good it is.

    Args:
        second: where the second branch's encoder is, if it has one of its own.
    """
    lines = [
        "",
        f"The encoder is in {encoder}. To load it, with nothing but transformers and timm:",
        "",
        "    from transformers import AutoImageProcessor, AutoModel",
        f'    model = AutoModel.from_pretrained("{encoder}")',
        f'    processor = AutoImageProcessor.from_pretrained("{encoder}")',
        "",
    ]
    if second is not None:
        lines += [f"That of the second branch is in {second}, whose card says how to load it.", ""]
    measured = _of_these_images(rows, monitor)
    if monitor is None:
        lines.append("No labelled held-out split, so no kNN accuracy was measured.")
    if monitor is None and rows and "embedding_std" in rows[-1]:
        last = rows[-1]
        lines.append(
            f"Embeddings of the last batch: std {last['embedding_std']:.3f}, effective rank "
            f"{last['effective_rank']:.1f}, alignment {last['alignment']:.3f}, uniformity "
            f"{last['uniformity']:.3f}. A std near 0 or a rank near 1 is collapse."
        )
    if monitor is not None and measured:
        lines.append(f"{monitor.description}:")
        if "knn_pixels" in measured[0]:
            lines.append(f"    raw pixels          {100 * measured[0]['knn_pixels']:5.1f} %")
        if measured[0]["step"] == 0:
            lines.append(f"    encoder at step 0   {100 * measured[0]['knn']:5.1f} %")
        last = measured[-1]
        lines.append(f"    trained encoder     {100 * last['knn']:5.1f} % (step {last['step']})")
        if "probe" in last:
            lines.append("Of the same images, a linear classifier trained beside the encoder:")
            lines.append(f"    online linear probe {100 * last['probe']:5.1f} %")
    return "\n".join(lines)


def _of_these_images(
    rows: list[dict[str, Any]], monitor: KNNMonitor | None
) -> list[dict[str, Any]]:
    """The rows with an accuracy, but of other images, that a run was told to measure before."""
    found = [row for row in rows if "knn" in row]
    if monitor is None:
        return found
    return [row for row in found if row.get("knn_images", monitor.subject) == monitor.subject]


def results(rows: list[dict[str, Any]], monitor: KNNMonitor | None) -> list[Result]:
    """What a run has measured, for its card."""
    found = []
    measured = _of_these_images(rows, monitor)
    if monitor is not None and measured:
        last, how = measured[-1], monitor.description
        found.append(Result("20-NN top-1 accuracy", last["knn"], f"{how}, at the last step", True))
        if "probe" in last:
            how = (
                "the same images, by a linear classifier that learned from the views beside the "
                "encoder"
            )
            found.append(Result("online linear probe accuracy", last["probe"], how, True))
        if measured[0]["step"] == 0:
            how = "the same, of the encoder before training"
            value = measured[0]["knn"]
            found.append(
                Result("20-NN top-1 accuracy, untrained", value, how, True, of_model=False)
            )
        if "knn_pixels" in measured[0]:
            how = "the same, of the pixels themselves"
            value = measured[0]["knn_pixels"]
            found.append(
                Result("20-NN top-1 accuracy, raw pixels", value, how, True, of_model=False)
            )
    last = next((row for row in reversed(rows) if "embedding_std" in row), None)
    if last is not None:
        batch = "embeddings of the last batch of views"
        found += [
            Result("embedding std", last["embedding_std"], f"{batch}; 0 is collapse"),
            Result("effective rank", last["effective_rank"], f"{batch}; 1 is collapse"),
            Result("alignment", last["alignment"], f"{batch}; distance of two views, 0 to 4"),
            Result("uniformity", last["uniformity"], f"{batch}; less is more even"),
        ]
    return found
