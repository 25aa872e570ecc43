"""The first and last message of a run, and the results on its card."""

from __future__ import annotations

from pathlib import Path

from vicreg_hf.hub.record import Result, impersonal
from vicreg_hf.runtime.console import optional
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.run import Run


def first_message(
    args: PretrainingArguments,
    *,
    parameters: int,
    trained: int | None = None,
    images: int | None,
    step: int,
    total_steps: int,
    hardware: str,
) -> str:
    """The sentence that begins a run: what is trained, on what, for how long, where it goes.

    Args:
        parameters: of the backbone.
        trained: those of them that are not frozen; None for all.
        images: in the training split, or None where a stream does not say.
        step: the step from which the run goes on.
    """
    data = impersonal(args.dataset_name)
    of = f"the stream {data}" if images is None else f"{images:,} images of {data}"
    whole = f"{total_steps:,} steps" if total_steps > 1 else "1 step"
    steps = whole if step == 0 else f"steps {step + 1:,} to {total_steps:,}"
    if step == total_steps:
        steps = f"none of {whole} left"
    size = f"{parameters / 1e6:.3g} million parameters"
    if trained not in (None, parameters):
        size += f", {trained:,} of them trained"
    return (
        f"Pretraining {args.architecture} ({size}, expander {args.expander_dims}) on {of}, "
        f"{args.image_size} pixels: {steps}, {args.batch_size:,} images each, on {hardware}, "
        f"into {args.output_dir}."
    )


def last_message(run: Run, encoder: Path, second: Path | None) -> str:
    """The lines that end a run: where the encoder is, how to load it, how good it is.

    Args:
        second: directory of the second branch's encoder, if it has one of its own.
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
    if run.monitor is None:
        lines.append("No labelled held-out split, so no kNN accuracy was measured.")
    with optional("the measurements are not shown"):
        for result in card_results(run):
            lines.append(f"{result.name}: {result.shown} ({result.measured})")
    return "\n".join(lines)


def card_results(run: Run) -> list[Result]:
    """The measurements of a run, for its card and its last message."""
    rows, monitor = run.log.rows(), run.monitor
    results = []
    # an earlier session may have measured other images
    measured = [] if monitor is None else [
        r for r in rows if "knn" in r and r.get("knn_images", monitor.subject) == monitor.subject
    ]  # fmt: skip
    if monitor is not None and measured:
        first, last, knn = measured[0], measured[-1], "20-NN top-1 accuracy"
        results.append(
            Result(knn, last["knn"], f"{monitor.description}, at the last step", percent=True)
        )
        if "probe" in last:
            how = (
                "the same images, by a linear classifier that learned from the views beside the "
                "encoder"
            )
            results.append(Result("online linear probe accuracy", last["probe"], how, percent=True))
        untrained = first["knn"] if first["step"] == 0 else None
        results += [
            Result(f"{knn}, {name}", value, f"the same, of {what}", percent=True, of_model=False)
            for name, value, what in (
                ("untrained", untrained, "the encoder before training"),
                ("raw pixels", first.get("knn_pixels"), "the pixels themselves"),
            )
            if value is not None
        ]
    last = next((row for row in reversed(rows) if "embedding_std" in row), None)
    if last is not None:
        batch = "embeddings of the last batch of views"
        results += [
            Result("embedding std", last["embedding_std"], f"{batch}; 0 is collapse"),
            Result("effective rank", last["effective_rank"], f"{batch}; 1 is collapse"),
            Result("alignment", last["alignment"], f"{batch}; distance of two views, 0 to 4"),
            Result("uniformity", last["uniformity"], f"{batch}; less is more even"),
        ]
    return results
