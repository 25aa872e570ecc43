"""The first and last message of a run, and the results on its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicreg_hf.hub.record import Result, impersonal
from vicreg_hf.runtime.console import optional
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.choosing import chosen_step, describe_choice
from vicreg_hf.training.run import Run

FEW, LARGE = 500, 5_000_000
"""Images below which a run is advised to begin with learned weights, and parameters above which a
run on a CPU is advised to take a smaller network."""


def first_message(
    args: PretrainingArguments,
    *,
    parameters: int,
    trained: int | None = None,
    images: int | None,
    step: int,
    total_steps: int,
    hardware: str,
    start: str | None = None,
) -> str:
    """The sentence that begins a run: what is trained, on what, for how long, where it goes.

    Args:
        parameters: of the backbone.
        trained: those of them that are not frozen; None for all.
        images: in the training split, or None where a stream does not say.
        step: the step from which the run goes on.
        start: the encoder whose weights it starts from, if it is not new.
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
    if start is not None:
        size += f", from the weights of {start}"
    return (
        f"Pretraining {args.architecture} ({size}, expander {args.expander_dims}) on {of}, "
        f"{args.image_size} pixels: {steps}, {args.batch_size:,} images each, on {hardware}, "
        f"into {args.output_dir}."
    )


def advice(run: Run) -> list[str]:
    """A line for each thing that beginners have better otherwise, before a run's first step."""
    args, images, lines = run.args, run.inputs.train.num_images, list[str]()
    if run.step:
        return lines
    if run.monitor is not None and run.monitor.leaves_one_out and run.monitor.trained_on:
        lines.append(
            "There are no held-out images: kNN is measured on those that are trained on. Put some "
            "of each class into a folder test beside train, or name others with "
            "--monitor_dataset_name."
        )
    pretrained = args.pretrained or args.init_from is not None
    on_cpu = run.accelerator.device.type == "cpu"
    if images is not None and images < FEW and not pretrained:
        recipe = "small-data-cpu" if on_cpu else "small-data"
        lines.append(
            f"{images:,} images are few to learn from: --config {recipe} begins with weights that "
            "have learned from ImageNet."
        )
    parameters = sum(p.numel() for p in run.model.encoder.parameters())
    if on_cpu and parameters > LARGE:
        lines.append(
            f"{args.architecture} is large for a CPU: --config tiny-cpu trains a small network, "
            "and --max_steps 20 shows how long a step takes."
        )
    return lines


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
        lines.append("No images with classes, so no kNN accuracy was measured.")
    if (choice := describe_choice(run)) is not None:
        lines.append(f"Its weights are {choice}.")
    with optional("the measurements are not shown"):
        for result in card_results(run):
            lines.append(f"{result.name}: {result.shown} ({result.measured})")
    return "\n".join(lines)


def card_results(run: Run) -> list[Result]:
    """The measurements of the step that is published, for a run's card and its last message."""
    chosen = chosen_step(run)
    rows = [row for row in run.log.rows() if row["step"] <= chosen]
    at = "at the last step" if chosen == run.step else f"at step {chosen:,}"
    last = next((row for row in reversed(rows) if "embedding_std" in row), None)
    results = [*_labelled_results(run, rows, at), *_sample_results(run, rows, at)]
    if last is None:
        return results
    batch = "embeddings of the last batch of views"
    if chosen != run.step:
        batch = f"embeddings of the batch of views of step {last['step']:,}"
    embeddings = "of a batch's embeddings"
    results += [
        Result(f"std {embeddings}", last["embedding_std"], f"{batch}; 0 is collapse"),
        Result(
            f"effective rank {embeddings}",
            last["effective_rank"],
            f"{batch}; 1 is collapse",
        ),
        Result(
            f"alignment {embeddings}",
            last["alignment"],
            f"{batch}; distance of two views, 0 to 4",
        ),
        Result(f"uniformity {embeddings}", last["uniformity"], f"{batch}; less is more even"),
    ]
    return results


def _labelled_results(run: Run, rows: list[dict[str, Any]], at: str) -> list[Result]:
    """Accuracies of kNN and of the online probe.

    Args:
        rows: of metrics.jsonl up to the step that is published.
        at: a phrase for that step.
    """
    monitor = run.monitor
    # an earlier session may have measured other images
    measured = [] if monitor is None else [
        r for r in rows if "knn" in r and r.get("knn_images", monitor.subject) == monitor.subject
    ]  # fmt: skip
    if monitor is None or not measured:
        return []
    first, last, knn = measured[0], measured[-1], monitor.name
    results = [Result(knn, last["knn"], f"{monitor.description}, {at}", percent=True)]
    if "probe" in last:
        how = (
            "the same images, by a linear classifier that learned from the views beside the encoder"
        )
        results.append(Result("online linear probe accuracy", last["probe"], how, percent=True))
    started = run.args.pretrained or bool(run.starts)
    untrained = first["knn"] if first["step"] == 0 else None
    return results + [
        Result(f"{knn}, {name}", value, f"the same, of {what}", percent=True, of_model=False)
        for name, value, what in (
            (
                "before training" if started else "untrained",
                untrained,
                "the encoder before training",
            ),
            ("raw pixels", first.get("knn_pixels"), "the pixels themselves"),
        )
        if value is not None
    ]


def _sample_results(run: Run, rows: list[dict[str, Any]], at: str) -> list[Result]:
    """The effective ranks that are measured without labels; arguments as in `_labelled_results`."""
    measured = [row for row in rows if "sample_effective_rank" in row]
    if run.sample is None or not measured:
        return []
    return [
        Result(
            f"effective rank of {kind}", measured[-1][f"sample_{column}"],
            f"RankMe of {kind} of {run.sample.description}, {at}",
        )
        for kind, column in (
            ("representations", "effective_rank"), ("embeddings", "embedding_effective_rank"),
        )
    ]  # fmt: skip
