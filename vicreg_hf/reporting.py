"""What a run writes and says about itself."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vicreg_hf.arguments import PretrainingArguments
from vicreg_hf.monitor import KNNMonitor
from vicreg_hf.records import Result, impersonal
from vicreg_hf.whole_files import replacing


class MetricsLog:
    """metrics.jsonl: one JSON object a line, written by the main process; null is not finite."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path, self.enabled = path, enabled

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):  # torn by a kill; it is written again
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append({k: math.nan if v is None else v for k, v in row.items()})
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Append a row.

        Raises:
            OSError: the disk is full, say; it names the file.
        """
        if self.enabled:
            try:
                with self.path.open("a") as file:
                    file.write(_line(row))
            except OSError as error:  # of a write, which does not know where it goes
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def keep_until(self, step: int) -> None:
        """Drop what a run wrote after the checkpoint it resumes from."""
        if self.enabled:
            kept = [row for row in self.rows() if row["step"] <= step]
            with replacing(self.path) as aside:
                aside.write_text("".join(map(_line, kept)))


def _line(row: dict[str, Any]) -> str:
    """As JSON, which has no word for what is not finite, such as a norm that fp16 did not hold."""
    numbers = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
    return json.dumps(dict.fromkeys(row) | numbers) + "\n"


class Clock:
    """Views per second since the last restart; evaluation and saving are not counted."""

    def __init__(self, views_per_step: int) -> None:
        self.views_per_step = views_per_step
        self.restart()

    def restart(self) -> None:
        self.steps, self.started = 0, time.perf_counter()

    def tick(self) -> None:
        self.steps += 1

    def rate(self) -> float:
        return self.steps * self.views_per_step / (time.perf_counter() - self.started)


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
