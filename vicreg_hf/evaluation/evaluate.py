"""Measuring an encoder on a labelled data set, by several protocols at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import datasets

from vicreg_hf.data.classes import describe_missing_classes
from vicreg_hf.data.labelled import Labelled, LabelledData, open_labelled
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.evaluation.card import add_evaluation
from vicreg_hf.evaluation.pair_embeddings import Pairs, open_pairs
from vicreg_hf.evaluation.protocols import RUNNERS
from vicreg_hf.evaluation.report.gallery import Gallery
from vicreg_hf.evaluation.requirements import require_labels, require_neighbours
from vicreg_hf.evaluation.task import Task
from vicreg_hf.features.cache import Features, cached_features
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.hub.card import CARD_FILE
from vicreg_hf.hub.record import impersonal
from vicreg_hf.runtime.checks import read_range
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import clear_leftovers, replacing, writing
from vicreg_hf.runtime.machine import hardware, software, start_accelerator
from vicreg_hf.runtime.output_dir import set_aside
from vicreg_hf.settings.evaluation import TRAINED, EvaluationArguments

RESULTS, REPORT = "results.json", "report.html"
SAME_FACTS = ("encoder_sha256", "dataset", "train_split", "eval_split", "preprocessing", "bf16")
"""Facts in which results must agree to take one another's place."""
Say = Callable[[str], object]


def evaluate(args: EvaluationArguments, *, say: Say = print) -> dict[str, Any]:
    """Measure an encoder, write results.json and report.html, and add to its card.

    Everything that can be refused is refused before an image is encoded. Every process must call
    this.

    Args:
        say: told what was measured.

    Returns:
        The contents of results.json.

    Raises:
        ValueError: a setting, encoder or data set that cannot be, or labels that do not suffice.
        ImageError: too many images cannot be used.
        FloatingPointError: a training diverged.
    """
    accelerator = start_accelerator()
    datasets.disable_progress_bars()
    output_dir, main = Path(str(args.output_dir)), accelerator.is_main_process
    tell = say if main else lambda _: None
    encoder = open_encoder(args.model, args.revision)
    opened: list[tuple[LabelledData, Pairs | None]] = []
    for main_first in (True, False):
        with failing_together(accelerator.device):
            if main == main_first:
                opened.append(_open_data(args, encoder))
    ((data, pairs),) = opened
    require_labels(args, data, num_processes=accelerator.num_processes)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output_dir).close()
    encoder.module.to(accelerator.device)
    task = Task(args, accelerator, encoder, data, pairs)
    task.usable = cached_features(
        encoder, {"train": data.train.split, "test": data.test.split}, Path(args.cache_dir),
        accelerator, batch_size=args.batch_size, num_workers=args.num_workers, bf16=args.bf16,
        max_bad_fraction=args.max_bad_fraction,
    )  # fmt: skip
    for name, features in task.usable.items():
        task.features[name] = _with_class(task.part(name), features, tell)
    _tell_of_missing_classes(task, tell)
    require_neighbours(args, len(task.features["train"].rows), data.train.split.name)
    for protocol in args.protocol_names:
        before = len(task.measurements)
        if protocol in TRAINED:
            RUNNERS[protocol](task)
        else:
            with failing_together(accelerator.device):
                if main:
                    RUNNERS[protocol](task)
        for measurement in task.measurements[before:]:
            tell(f"{measurement.name}: {measurement.shown}")
    results = _results(task)
    with failing_together(accelerator.device):
        if main:
            _write(task, results, output_dir, say)
    accelerator.end_training()
    return results


def _open_data(args: EvaluationArguments, encoder: Encoder) -> tuple[LabelledData, Pairs | None]:
    data = open_labelled(
        args.dataset_name, train_split=args.train_split, eval_split=args.eval_split,
        config_name=args.dataset_config_name, image_column=args.image_column,
        label_column=args.label_column, channels=encoder.in_chans, sound=encoder.sound,
        value_range=read_range("value_range", args.value_range) or encoder.value_range,
    )  # fmt: skip
    if "cross-retrieval" not in args.protocol_names:
        return data, None
    splits = open_dataset(args.dataset_name, args.dataset_config_name)
    splits = add_parts(splits, eval_split=data.test_name)
    return data, open_pairs(
        args.model, splits[data.test_name], data.test.split, column=args.prime_column,
        tokenizer=args.prime_tokenizer,
    )  # fmt: skip


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


def _write(task: Task, results: dict[str, Any], output_dir: Path, say: Say) -> None:
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
            _write_report(task, results, report)
        written += f", and {REPORT} to open in a browser"
    say(f"{written}.")
    if task.args.update_card:
        _update_card(task, say)


def _measured_anew(path: Path, results: dict[str, Any]) -> bool:
    """Whether all that an earlier results.json holds is among new results, or there is none."""
    if not path.exists():
        return True
    try:
        before = json.loads(path.read_text())
        same = all(before[fact] == results[fact] for fact in SAME_FACTS)
        return same and {m["name"] for m in before["results"]} <= {
            m["name"] for m in results["results"]
        }
    except (ValueError, KeyError, TypeError):  # written by something else
        return False


def _results(task: Task) -> dict[str, Any]:
    """The contents of results.json."""
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
    }


def _write_report(task: Task, results: dict[str, Any], path: Path) -> None:
    from vicreg_hf.evaluation.report.report import write_report

    data, seed = task.data, task.args.seed
    side = " x ".join(map(str, results["preprocessing"]["input_size"]))
    facts = {
        "model": str(results["model"]),
        "data": f"{results['dataset']}, {data.train_name} ({results['num_train_images']:,} images) "
                f"and {data.test_name} ({results['num_eval_images']:,})",
        "preprocessing": f"{side}, {100 * results['preprocessing']['crop_pct']:.3g} % centre crop",
        "features": str(results["num_features"]),
        "hardware": results["hardware"],
        "software": ", ".join(f"{name} {of}" for name, of in results["software"].items()),
        "seed": str(seed),
    }  # fmt: skip
    write_report(
        path, title=f"{results['model']} on {results['dataset']}", facts=facts,
        measurements=task.measurements, predictions=task.predictions, class_names=data.names,
        train=_gallery(task, "train"), test=_gallery(task, "test"), seed=seed,
    )  # fmt: skip


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
