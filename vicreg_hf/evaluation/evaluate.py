"""Measuring an encoder on a labelled data set, by several protocols at once.

Shapes: N training and M test images that can be used, F features, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import datasets
import torch
from torch import Tensor
from yaml import YAMLError

from vicreg_hf.data.classes import describe_missing_classes
from vicreg_hf.data.labelled import Labelled, LabelledData, open_labelled
from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.slicing import add_parts
from vicreg_hf.evaluation.card import add_evaluation
from vicreg_hf.evaluation.measurements import Measurement
from vicreg_hf.evaluation.pair_embeddings import Pairs, open_pairs
from vicreg_hf.evaluation.protocols import NO_LABELS, Measured, Task, run_protocol
from vicreg_hf.evaluation.report.gallery import Gallery
from vicreg_hf.evaluation.requirements import check_labels, check_neighbours
from vicreg_hf.features.cache import Features, cached_features
from vicreg_hf.features.encoders import Encoder, open_encoder
from vicreg_hf.hub.card import CARD_FILE
from vicreg_hf.hub.record import impersonal
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.distributed import failing_together
from vicreg_hf.runtime.files import clear_leftovers, replacing, writing
from vicreg_hf.runtime.machine import hardware, software
from vicreg_hf.runtime.output_dir import set_aside
from vicreg_hf.runtime.processes import start_accelerator
from vicreg_hf.settings.evaluation import TRAINED, EvaluationArguments

RESULTS, REPORT = "results.json", "report.html"
SUBJECT = ("encoder_sha256", "dataset", "train_split", "eval_split", "preprocessing", "bf16")
"""What results of an encoder must share to take one another's place."""


@dataclass
class Evaluation:
    """What an evaluation has found."""

    args: EvaluationArguments
    encoder: Encoder
    data: LabelledData
    device: torch.device
    num_processes: int
    measurements: list[Measurement] = field(default_factory=list)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    """(M,) classes by the name of the classifier."""
    features: dict[str, Features] = field(default_factory=dict)
    """Of train and test; where there are classes, of the images that have one."""


def evaluate(args: EvaluationArguments, *, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure an encoder, write results.json and report.html, and add to its card.

    Everything that can be refused is refused before an image is encoded. Every process must call
    this.

    Args:
        say: told what was measured.

    Returns:
        What results.json holds.

    Raises:
        ValueError: a setting, encoder or data set that cannot be, or labels that do not suffice.
        ImageError: too many images cannot be used.
        FloatingPointError: a training diverged.
    """
    accelerator = start_accelerator()
    datasets.disable_progress_bars()
    output_dir = Path(str(args.output_dir))
    encoder = open_encoder(args.model, args.revision)
    data: Any = None
    pairs: Pairs | None = None
    for main_first in (True, False):
        with failing_together(accelerator.device):
            if accelerator.is_main_process == main_first:
                data = open_labelled(
                    args.dataset_name, train_split=args.train_split, eval_split=args.eval_split,
                    config_name=args.dataset_config_name, image_column=args.image_column,
                    label_column=args.label_column, channels=encoder.in_chans,
                    sound=encoder.sound,
                )  # fmt: skip
                if "cross-retrieval" in args.protocol_names:
                    pairs = _pairs(args, data)
    check_labels(args, data, num_processes=accelerator.num_processes)
    _claim(output_dir)
    encoder.module.to(accelerator.device)
    found = Evaluation(args, encoder, data, accelerator.device, accelerator.num_processes)
    features = cached_features(
        encoder, {"train": data.train.split, "test": data.test.split}, Path(args.cache_dir),
        accelerator, batch_size=args.batch_size, num_workers=args.num_workers, bf16=args.bf16,
        max_bad_fraction=args.max_bad_fraction,
    )  # fmt: skip
    tell = say if accelerator.is_main_process else lambda _: None
    found.features = {
        "train": _labelled(data.train, features["train"], tell),
        "test": _labelled(data.test, features["test"], tell),
    }
    _say_what_is_unlearnt(found, tell)
    check_neighbours(args, len(found.features["train"].rows), data.train.split.name)
    for protocol in args.protocol_names:
        measured = Measured()
        seen = features if protocol in NO_LABELS else found.features
        task = Task(args, accelerator, encoder, data, seen, pairs)
        if protocol in TRAINED:
            measured = run_protocol(protocol, task)
        else:
            with failing_together(accelerator.device):
                if accelerator.is_main_process:
                    measured = run_protocol(protocol, task)
        found.measurements += measured.measurements
        found.predictions |= measured.predictions
        for measurement in measured.measurements if accelerator.is_main_process else ():
            say(f"{measurement.name}: {measurement.shown}")
    results = summary(found)
    with failing_together(accelerator.device):
        if accelerator.is_main_process:
            _write(found, results, output_dir, say)
    accelerator.end_training()
    return results


def _say_what_is_unlearnt(found: Evaluation, say: Callable[[str], object]) -> None:
    """Tell of test images that nothing can classify rightly."""
    train, test = (
        _used(part, found.features[name])
        for name, part in (("train", found.data.train), ("test", found.data.test))
    )
    if train is None or test is None:
        return
    splits = found.data.train.split.name, found.data.test.split.name
    sentence = describe_missing_classes(train, test, found.data.names, splits)
    if sentence is not None:
        say(sentence)


def _labelled(part: Labelled, features: Features, say: Callable[[str], object]) -> Features:
    """The features of images that have a class, where there are classes."""
    if part.classes is None:
        return features
    known = part.classes[features.rows] >= 0
    if bool(known.all()):
        return features
    without = int((~known).sum())
    say(f"{without} of {len(known)} images of {part.split.name} have no class and are left out.")
    x = features.x[known] if len(features.x) else features.x  # other processes have none
    return Features(x, features.rows[known])


def _pairs(args: EvaluationArguments, data: LabelledData) -> Pairs:
    splits = open_dataset(args.dataset_name, args.dataset_config_name)
    splits = add_parts(splits, eval_split=data.test_name)
    return open_pairs(
        args.model, splits[data.test_name], data.test.split, column=args.prime_column,
        tokenizer=args.prime_tokenizer,
    )  # fmt: skip


def _write(
    found: Evaluation, results: dict[str, Any], output_dir: Path, say: Callable[[str], object]
) -> None:
    clear_leftovers(output_dir)
    remedy = "What was in it is as it was; free some space or choose another."
    with writing(output_dir, remedy=remedy), replacing(output_dir / RESULTS) as aside:
        aside.write_text(json.dumps(results, indent=2) + "\n")
        with replacing(output_dir / REPORT) as report:
            _write_report(found, results, report)
            if not _measured_anew(output_dir / RESULTS, results):
                set_aside(output_dir, (RESULTS, REPORT), say)
    say(f"In {output_dir}: {RESULTS}, and {REPORT} to open in a browser.")
    if found.args.update_card:
        _update_card(found, say)


def _measured_anew(path: Path, results: dict[str, Any]) -> bool:
    """Whether all that an earlier results.json holds is among new results, or there is none."""
    if not path.exists():
        return True
    try:
        before = json.loads(path.read_text())
        same = all(before[fact] == results[fact] for fact in SUBJECT)
        return same and {m["name"] for m in before["results"]} <= {
            m["name"] for m in results["results"]
        }
    except (ValueError, KeyError, TypeError):  # written by something else
        return False


def _claim(output_dir: Path) -> None:
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output_dir).close()


def summary(found: Evaluation) -> dict[str, Any]:
    """What results.json holds."""
    encoder, data = found.encoder, found.data
    return {
        "model": impersonal(found.args.model),
        "revision": found.args.revision,
        "encoder_sha256": encoder.fingerprint(),
        "dataset": impersonal(found.args.dataset_name),
        "train_split": data.train_name,
        "eval_split": data.test_name,
        "num_train_images": len(found.features["train"].rows),
        "num_eval_images": len(found.features["test"].rows),
        "num_features": encoder.num_features,
        "preprocessing": json.loads(json.dumps(dict(encoder.data_config))),
        "bf16": found.args.bf16,
        "hardware": hardware(found.device, found.num_processes),
        "software": software("vicreg_hf", "torch", "timm", "transformers", "python"),
        "results": [measurement.to_dict() for measurement in found.measurements],
    }


def _write_report(found: Evaluation, results: dict[str, Any], path: Path) -> None:
    from vicreg_hf.evaluation.report.report import write_report

    data = found.data
    side = " x ".join(map(str, results["preprocessing"]["input_size"]))
    facts = {
        "model": str(results["model"]),
        "data": f"{results['dataset']}, {data.train_name} ({results['num_train_images']:,} images) "
                f"and {data.test_name} ({results['num_eval_images']:,})",
        "preprocessing": f"{side}, {100 * results['preprocessing']['crop_pct']:.3g} % centre crop",
        "features": str(results["num_features"]),
        "hardware": results["hardware"],
        "software": ", ".join(f"{name} {of}" for name, of in results["software"].items()),
        "seed": str(found.args.seed),
    }  # fmt: skip
    labels = _used(data.test, found.features["test"])
    write_report(
        path, title=f"{results['model']} on {results['dataset']}", facts=facts,
        measurements=found.measurements, predictions=found.predictions or None, labels=labels,
        class_names=data.names if labels is not None else (),
        train=_gallery(data.train, found.features["train"]),
        test=_gallery(data.test, found.features["test"]), seed=found.args.seed,
    )  # fmt: skip


def _used(part: Labelled, features: Features) -> Tensor | None:
    """The classes of the images that can be used."""
    return None if part.classes is None else part.classes[features.rows]


def _gallery(part: Labelled, features: Features) -> Gallery:
    def read(places: Any) -> list[Tensor]:
        return part.split.read([int(features.rows[int(place)]) for place in places])

    return Gallery(features.x, _used(part, features), read)


def _update_card(found: Evaluation, say: Callable[[str], object]) -> None:
    model = Path(found.args.model)
    for directory in (model / "encoder", model):
        card = directory / CARD_FILE
        if card.is_file() and (directory / "config.json").is_file():
            try:
                add_evaluation(
                    card, found.measurements, dataset=str(impersonal(found.args.dataset_name)),
                    split=found.data.test_name,
                )  # fmt: skip
            except (OSError, ValueError, YAMLError) as error:  # one that people have written
                say(f"warning: {card} was left as it was: {one_line(error)}")
            else:
                say(f"The results were added to {card}; --no_update_card leaves it alone.")
            return
