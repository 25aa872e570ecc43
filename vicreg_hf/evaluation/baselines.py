"""Others in an encoder's place, with which it is compared: pixels, and random weights.

Shapes: B images, C channels, S side in pixels, M test images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vicreg_hf.data.memory import SMALL_IMAGE
from vicreg_hf.evaluation.dense.segmentation import (
    MEAN_IOU,
    input_size,
    measure_maps,
    pixels_of_cells,
)
from vicreg_hf.evaluation.measurements import Baseline, Measurement, scored
from vicreg_hf.evaluation.report.verdict import PIXELS, UNTRAINED
from vicreg_hf.evaluation.task import Task
from vicreg_hf.features.cache import cached_features
from vicreg_hf.features.encoders import Encoder, untrained_like
from vicreg_hf.metrics.intervals import wilson_interval
from vicreg_hf.metrics.knn import knn_predict
from vicreg_hf.runtime.distributed import failing_together

FEW_IMAGES = 5000
"""Images of both splits up to which baselines are measured unasked, as that takes little."""
FEW_MAPS = 1000
"""Images of both splits up to which baselines of segmentation, which takes longer, are measured
unasked."""
PIXEL_SIDE = 32
"""Larger views are shrunk to this side before their pixels are compared."""
RUNS_K, RUNS_IMAGES = 20, (50_000, 10_000)
"""Neighbours of a run's own kNN, and the training and test images that it uses at most."""


def measure_baselines(task: Task, others: Sequence[Task] = ()) -> None:
    """Measure what an encoder must beat, as `--baselines` asks; every process must call it.

    They are measured by kNN, or without it by segmentation, whichever stands in the first line.

    By default raw pixels are measured where views are small or images few, and the untrained
    encoder where images are few; what the encoder's own run has measured on these images is taken
    from its metrics.jsonl.

    Args:
        others: measured before, whose pixels need not be measured again if views are the same.
    """
    args, encoder = task.args, task.encoder
    if args.baselines is False:
        return
    if "knn" not in args.protocol_names:
        if "segmentation" in args.protocol_names:
            _measure_maps(task)
        return
    few = len(task.data.train.split) + len(task.data.test.split) <= FEW_IMAGES
    wanted = bool(args.baselines or few)  # measured, they are compared on the same images
    task.baselines |= {} if wanted else _measured_by_the_run(task)
    if (shared := _pixels_of_another(task, others)) is not None:
        task.baselines.setdefault(PIXELS, shared)
    small = encoder.image_size <= SMALL_IMAGE
    if (wanted or small) and PIXELS not in task.baselines:
        _measure(task, PIXELS, pixels_of(encoder))
    other = untrained_like(encoder, seed=args.seed) if wanted else None
    if other is not None:
        _measure(task, UNTRAINED, other)


def _pixels_of_another(task: Task, others: Sequence[Task]) -> Baseline | None:
    """The pixels that another task has measured, if its views are the same."""
    same = (o.baselines for o in others if o.encoder.data_config == task.encoder.data_config)
    return next((found[PIXELS] for found in same if PIXELS in found), None)


def _measure_maps(task: Task) -> None:
    """Measure by segmentation the pixels below each position, and the untrained encoder."""
    images = len(task.data.train.split) + len(task.data.test.split)
    if not task.args.baselines and images > FEW_MAPS:
        return
    encoders: dict[str, Encoder | None] = {
        PIXELS: pixels_of_cells(task.encoder, input_size(task)),
        UNTRAINED: untrained_like(task.encoder, seed=task.args.seed),
    }
    for name, encoder in encoders.items():
        if encoder is None:
            continue
        encoder = replace(encoder, module=encoder.module.to(task.device))
        found = measure_maps(task, encoder, f"{MEAN_IOU}, {name}")
        if found is not None:
            task.baselines[name] = Baseline(found.measurement)


def pixels_of(encoder: Encoder) -> Encoder:
    """An encoder that gives the pixels of another's views, shrunk if they are large."""
    side = encoder.image_size if encoder.image_size <= SMALL_IMAGE else PIXEL_SIDE
    shrink = nn.Identity() if side == encoder.image_size else nn.AdaptiveAvgPool2d(side)
    with torch.no_grad():
        width = shrink(torch.zeros(1, *encoder.data_config["input_size"])).numel()
    identity = {"pixels": side, "of": encoder.identity}
    module = nn.Sequential(shrink, nn.Flatten()).eval()
    return replace(encoder, module=module, num_features=width, identity=identity)


def _measure(task: Task, name: str, encoder: Encoder) -> None:
    """Measure another encoder on the images that the task uses."""
    args, device, x = task.args, task.device, dict[str, Tensor]()
    found = cached_features(
        replace(encoder, module=encoder.module.to(device)),
        {part: task.part(part).split for part in ("train", "test")}, Path(args.cache_dir),
        task.accelerator, batch_size=args.batch_size, num_workers=args.num_workers,
        bf16=args.bf16, max_bad_fraction=args.max_bad_fraction, say=lambda _: None,
    )  # fmt: skip
    with failing_together(device):
        if not task.accelerator.is_main_process:
            return
        for part, features in found.items():
            wanted = torch.isin(features.rows, task.features[part].rows)
            x[part] = features.x[wanted].to(device)
        k = args.numbers("knn_k", len(x["train"]))[0]
        predicted = knn_predict(
            x["train"], task.labels("train"), x["test"], k=k, temperature=args.temperature
        )
        settings = {"k": k, "temperature": args.temperature, "similarity": "cosine"}
        scores = predicted == task.labels("test")
        label = f"{k}-NN top-1 accuracy, {name}"
        measurement = scored("knn", label, scores, args.seed, settings)
        task.baselines[name] = Baseline(measurement, predicted.cpu())


def _measured_by_the_run(task: Task) -> dict[str, Baseline]:
    """Accuracies from before training, where the encoder's run measured them on these images."""
    splits, found = (task.data.train.split, task.data.test.split), dict[str, Baseline]()
    sizes = [len(task.features[part].rows) for part in ("train", "test")]
    same = task.args.numbers("knn_k", len(splits[0]))[0] == RUNS_K
    same &= all(n <= most for n, most in zip(sizes, RUNS_IMAGES, strict=True))
    model = Path(task.args.model)
    for run in (model, model.resolve().parent) if same and model.is_dir() else ():
        for settings, row in _first_measurement(run):
            prefix = "" if settings.get("monitor_dataset_name") is None else "monitor_"
            data = str(settings.get(f"{prefix}dataset_name"))
            subject = f"{splits[1].name}, neighbours from {splits[0].name}"
            if not _same_place(data, task.args.dataset_name) or row.get("knn_images") != subject:
                continue
            for name, key in ((PIXELS, "knn_pixels"), (UNTRAINED, "knn")):
                if isinstance(share := row.get(key), float):
                    found[name] = _baseline(name, share, sizes[1], task)
    return found


def _first_measurement(run: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The settings of a run and its row from before training, if both are there."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        settings = yaml.safe_load((run / "config.yaml").read_text())
        with (run / "metrics.jsonl").open() as lines:
            row = json.loads(next(iter(lines), "{}"))
        if row.get("step") == 0 and isinstance(settings, dict):
            yield settings, row


def _same_place(one: str, other: str) -> bool:
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one == other


def _baseline(name: str, share: float, images: int, task: Task) -> Baseline:
    low, high = wilson_interval(share * images, images)
    return Baseline(
        Measurement(
            "knn", f"{RUNS_K}-NN top-1 accuracy, {name}", share, images, task.args.seed,
            {"k": RUNS_K, "measured by": "the run that trained the encoder"}, low, high,
        )
    )  # fmt: skip
