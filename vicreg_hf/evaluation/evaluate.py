"""Measuring encoders on a labelled data set, by several protocols at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from vicreg_hf.data.classes import describe_missing_classes
from vicreg_hf.data.labelled import Labelled, LabelledData, open_labelled
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.evaluation.baselines import measure_baselines
from vicreg_hf.evaluation.card import add_evaluation
from vicreg_hf.evaluation.classifier import check_savable
from vicreg_hf.evaluation.dense.looking import maps_of_task
from vicreg_hf.evaluation.dense.masks import Masks, find_mask_column, open_masks
from vicreg_hf.evaluation.dense.segmentation import input_size
from vicreg_hf.evaluation.pair_embeddings import Pairs, open_pairs
from vicreg_hf.evaluation.protocols import RUNNERS, TOGETHER
from vicreg_hf.evaluation.report.gallery import Gallery
from vicreg_hf.evaluation.report.verdict import Evaluated, differences, right_answers, verdict
from vicreg_hf.evaluation.requirements import require_labels, require_neighbours
from vicreg_hf.evaluation.task import Task
from vicreg_hf.features.cache import Features, cached_features
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.features.maps import map_encoder
from vicreg_hf.hub.card import CARD_FILE
from vicreg_hf.hub.record import impersonal
from vicreg_hf.runtime.checks import read_range
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import clear_leftovers, replacing, writing
from vicreg_hf.runtime.machine import hardware, software, start_accelerator
from vicreg_hf.runtime.output_dir import set_aside
from vicreg_hf.settings.evaluation import EvaluationArguments, run_name

RESULTS, REPORT = "results.json", "report.html"
SAME_FACTS = ("encoder_sha256", "dataset", "train_split", "eval_split", "preprocessing", "bf16")
"""Facts in which results must agree to take one another's place."""
Say = Callable[[str], object]


def evaluate(args: EvaluationArguments, *, say: Say = print) -> dict[str, Any]:
    """Measure encoders, write results.json and report.html, and add to their cards.

    Everything that can be refused is refused before an image is encoded. Every process must call
    this. Several encoders are measured on the same images, each with its own preprocessing.

    Args:
        say: told what was measured.

    Returns:
        The contents of results.json: of several encoders, a list of them under `models`.

    Raises:
        ValueError: a setting, encoder or data set that cannot be, or labels that do not suffice.
        ImageError: too many images cannot be used.
        FloatingPointError: a training diverged.
    """
    accelerator = start_accelerator()
    datasets.disable_progress_bars()
    output_dir, main = Path(str(args.output_dir)), accelerator.is_main_process
    tell = say if main else lambda _: None
    tasks = [_open_task(replace(args, model=name), accelerator) for name in args.model_names]
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output_dir).close()
    if args.save_classifier is not None:
        with failing_together(accelerator.device):
            if main:
                check_savable(tasks[0].encoder, tasks[0].data.names, args.save_classifier)
    for number, task in enumerate(tasks):
        _encode(task, None if number == 0 else lambda _: None)
    _keep_common_images([task.usable for task in tasks])
    for number, task in enumerate(tasks):
        said = tell if number == 0 else lambda _: None  # it is the same for all
        for name, features in task.usable.items():
            task.features[name] = _with_class(task.part(name), features, said)
        _tell_of_missing_classes(task, said)
        require_neighbours(args, len(task.features["train"].rows), task.data.train.split.name)
    for task, name in zip(tasks, display_names(args.model_names), strict=True):
        if len(tasks) > 1:
            tell(f"{name}:")
        _measure(task, tasks, tell)
    results: dict[str, Any] = {}
    with failing_together(accelerator.device):
        if main:
            results = _write(tasks, output_dir, say)
    accelerator.end_training()
    return results or _results(tasks, [])


def _open_task(args: EvaluationArguments, accelerator: Accelerator) -> Task:
    """An encoder and the data it is measured on, with labels that suffice."""
    encoder = open_encoder(args.model, args.revision)
    opened: list[tuple[LabelledData, Pairs | None, Masks | None]] = []
    for main_first in (True, False):
        with failing_together(accelerator.device):
            if accelerator.is_main_process == main_first:
                opened.append(_open_data(args, encoder))
    ((data, pairs, masks),) = opened
    require_labels(args, data, num_processes=accelerator.num_processes)
    task = Task(args, accelerator, encoder, data, pairs, masks)
    with failing_together(accelerator.device):
        if masks is not None:
            _ = map_encoder(encoder, input_size(task))  # which refuses one without a map
            if accelerator.is_main_process:
                images = {part: task.part(part).split for part in masks.samples}
                masks.read(images, seed=args.seed, max_bad_fraction=args.max_bad_fraction)
    return task


def _encode(task: Task, say: Say | None) -> None:
    args, data = task.args, task.data
    task.encoder.module.to(task.device)
    task.usable = cached_features(
        task.encoder, {"train": data.train.split, "test": data.test.split}, Path(args.cache_dir),
        task.accelerator, batch_size=args.batch_size, num_workers=args.num_workers,
        bf16=args.bf16, max_bad_fraction=args.max_bad_fraction, say=say,
    )  # fmt: skip


def _keep_common_images(found: Sequence[dict[str, Features]]) -> None:
    """Leave out images that one encoder can use and another cannot."""
    for part in ("train", "test"):
        common = found[0][part].rows
        for one in found:
            common = common[torch.isin(common, one[part].rows)]
        for one in found:
            kept = torch.isin(one[part].rows, common)
            if not bool(kept.all()):
                x = one[part].x[kept] if len(one[part].x) else one[part].x
                one[part] = Features(x, one[part].rows[kept])


def _measure(task: Task, tasks: Sequence[Task], tell: Say) -> None:
    for protocol in task.args.protocol_names:
        before = len(task.measurements)
        if protocol in TOGETHER:
            RUNNERS[protocol](task)
        else:
            with failing_together(task.device):
                if task.accelerator.is_main_process:
                    RUNNERS[protocol](task)
        for measurement in task.measurements[before:]:
            tell(f"{measurement.name}: {measurement.shown}")
    measure_baselines(task, tasks)
    for baseline in task.baselines.values():
        tell(f"{baseline.measurement.name}: {baseline.measurement.shown}")


def _open_data(
    args: EvaluationArguments, encoder: Encoder
) -> tuple[LabelledData, Pairs | None, Masks | None]:
    splits, image_column, mask_column = {}, args.image_column, None
    if {"segmentation", "cross-retrieval"} & set(args.protocol_names):
        splits = open_dataset(args.dataset_name, args.dataset_config_name)
    if "segmentation" in args.protocol_names and args.mask_dir is None:
        features = next(iter(splits.values())).features
        image_column, mask_column = find_mask_column(features, image_column, args.mask_column)
    data = open_labelled(
        args.dataset_name, train_split=args.train_split, eval_split=args.eval_split,
        config_name=args.dataset_config_name, image_column=image_column,
        label_column=args.label_column, channels=encoder.in_chans, sound=encoder.sound,
        value_range=read_range("value_range", args.value_range) or encoder.value_range,
    )  # fmt: skip
    pairs = masks = None
    if splits:
        splits = add_parts(splits, train_split=data.train_name, eval_split=data.test_name)
    if "cross-retrieval" in args.protocol_names:
        pairs = open_pairs(
            args.model, splits[data.test_name], data.test.split, column=args.prime_column,
            tokenizer=args.prime_tokenizer,
        )  # fmt: skip
    if "segmentation" in args.protocol_names:
        masks = open_masks(args, splits, data, mask_column)
    return data, pairs, masks


def _with_class(part: Labelled, features: Features, tell: Say) -> Features:
    """The features of images that have a class, where there are classes."""
    if part.classes is None:
        return features
    known = part.classes[features.rows] >= 0
    if bool(known.all()):
        return features
    without = int((~known).sum())
    tell(f"{without} of {len(known)} images of {part.split.name} have no class and are left out.")
    x = features.x[known] if len(features.x) else features.x  # other processes have none
    return Features(x, features.rows[known])


def _tell_of_missing_classes(task: Task, tell: Say) -> None:
    train, test, data = task.classes("train"), task.classes("test"), task.data
    if train is None or test is None:
        return
    splits = data.train.split.name, data.test.split.name
    sentence = describe_missing_classes(train, test, data.names, splits)
    if sentence is not None:
        tell(sentence)


def _write(tasks: Sequence[Task], output_dir: Path, say: Say) -> dict[str, Any]:
    """Write what was measured, and return the contents of results.json."""
    models = [
        Evaluated(name, task.measurements, task.predictions, _gallery(task, "train"),
                  _gallery(task, "test"), task.baselines, task.segmented, maps_of_task(task))
        for name, task in zip(display_names([t.args.model for t in tasks]), tasks, strict=True)
    ]  # fmt: skip
    sentences = verdict(models, seed=tasks[0].args.seed, resamples=tasks[0].args.num_resamples)
    results = _results(tasks, sentences)
    if len(tasks) > 1:
        results["differences"] = differences(
            right_answers(models), seed=tasks[0].args.seed,
            resamples=tasks[0].args.num_resamples,
        )  # fmt: skip
    clear_leftovers(output_dir)
    remedy = "What was in it is as it was; free some space or choose another."
    with writing(output_dir, remedy=remedy):
        with replacing(output_dir / RESULTS) as aside:
            aside.write_text(json.dumps(results, indent=2) + "\n")
            if not _measured_anew(output_dir / RESULTS, results):
                set_aside(output_dir, (RESULTS, REPORT), say)
        (output_dir / REPORT).unlink(missing_ok=True)  # it shows the results of before
    written = f"In {output_dir}: {RESULTS}"
    with optional(f"{REPORT} is left out of {output_dir}"):
        with replacing(output_dir / REPORT) as report:
            _write_report(tasks[0], models, results, report)
        written += f", and {REPORT} to open in a browser"
    say(" ".join(sentences))
    say(f"{written}.")
    for task in tasks:
        if task.args.update_card:
            _update_card(task, say)
    return results


def _measured_anew(path: Path, results: dict[str, Any]) -> bool:
    """Whether all that an earlier results.json holds is among new results, or there is none."""
    if not path.exists():
        return True
    try:
        before = json.loads(path.read_text())
        anew = results.get("models", [results])
        return all(any(_covers(new, old) for new in anew) for old in before.get("models", [before]))
    except (ValueError, KeyError, TypeError, AttributeError):  # written by something else
        return False


def _covers(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether an encoder's results hold all that earlier ones of the same encoder do."""
    same = all(old[fact] == new[fact] for fact in SAME_FACTS)
    return same and {m["name"] for m in old["results"]} <= {m["name"] for m in new["results"]}


def _results(tasks: Sequence[Task], sentences: Sequence[str]) -> dict[str, Any]:
    """The contents of results.json."""
    about = {"verdict": " ".join(sentences)}
    if len(tasks) == 1:
        return _results_of(tasks[0]) | about
    return about | {"models": [_results_of(task) for task in tasks]}


def _results_of(task: Task) -> dict[str, Any]:
    args, data, encoder = task.args, task.data, task.encoder
    return {
        "model": impersonal(args.model),
        "revision": args.revision,
        "encoder_sha256": encoder.fingerprint(),
        "dataset": impersonal(args.dataset_name),
        "train_split": data.train_name,
        "eval_split": data.test_name,
        "num_train_images": len(task.features["train"].rows),
        "num_eval_images": len(task.features["test"].rows),
        "num_features": encoder.num_features,
        "preprocessing": json.loads(json.dumps(dict(encoder.data_config))),
        "bf16": args.bf16,
        "hardware": hardware(task.device, task.accelerator.num_processes),
        "software": software("vicreg_hf", "torch", "timm", "transformers", "python"),
        "results": [measurement.to_dict() for measurement in task.measurements],
        "baselines": {
            name: baseline.measurement.to_dict() for name, baseline in task.baselines.items()
        },
    }


def _write_report(
    task: Task, models: Sequence[Evaluated], results: dict[str, Any], path: Path
) -> None:
    """Write the report of all models; the data are those of the first task."""
    from vicreg_hf.evaluation.report.report import write_report

    data, seed = task.data, task.args.seed
    each = results.get("models", [results])
    first = each[0]
    names = ", ".join(model.name for model in models)
    facts = {
        "data": f"{first['dataset']}, {data.train_name} ({first['num_train_images']:,} images) "
                f"and {data.test_name} ({first['num_eval_images']:,})",
    }  # fmt: skip
    for model, found in zip(models, each, strict=True):
        view, of = found["preprocessing"], f" of {model.name}" if len(models) > 1 else ""
        side = " x ".join(map(str, view["input_size"]))
        facts |= {
            f"model{of}": str(found["model"]),
            f"preprocessing{of}": f"{side}, {100 * view['crop_pct']:.3g} % centre crop",
            f"features{of}": str(found["num_features"]),
        }
    facts |= {
        "hardware": first["hardware"],
        "software": ", ".join(f"{name} {of}" for name, of in first["software"].items()),
        "seed": str(seed),
    }
    write_report(
        path, title=f"{names} on {first['dataset']}", facts=facts, models=models,
        class_names=data.names, seed=seed, resamples=task.args.num_resamples,
    )  # fmt: skip


def display_names(models: Sequence[str]) -> list[str]:
    """A name for each model, of which no two are alike: an encoder is known by its run."""
    names: list[str] = []
    for model in models:
        name = run_name(model) if Path(model).exists() else model  # an id on the Hub
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _gallery(task: Task, name: str) -> Gallery:
    features, split = task.features[name], task.part(name).split
    return Gallery(
        features.x, task.classes(name),
        lambda places: split.read([int(features.rows[int(place)]) for place in places]),
    )  # fmt: skip


def _update_card(task: Task, say: Say) -> None:
    model = Path(task.args.model)
    for directory in (model / "encoder", model):
        card = directory / CARD_FILE
        if card.is_file() and (directory / "config.json").is_file():
            with optional(f"{card} was left as it was"):  # people may have written it
                add_evaluation(
                    card, task.measurements, dataset=str(impersonal(task.args.dataset_name)),
                    split=task.data.test_name,
                )  # fmt: skip
                say(f"The results were added to {card}; --no_update_card leaves it alone.")
            return
