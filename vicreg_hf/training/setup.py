"""From settings to a run: everything is checked, loaded and built before the first step."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.hub.api import check_licence_at_hub, open_repository
from vicreg_hf.hub.card import PRIME_SUFFIX
from vicreg_hf.hub.layout import PRIME_DIRECTORY
from vicreg_hf.hub.push import describe_run_push
from vicreg_hf.loss.own import name_of_loss
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.batch_norm import synchronize
from vicreg_hf.models.compiling import compiler_fault
from vicreg_hf.models.timm_models import check_architecture
from vicreg_hf.publishing.publish import check_exportable
from vicreg_hf.runtime.distributed import any_process, main_process_first
from vicreg_hf.runtime.files import replacing, writing
from vicreg_hf.runtime.machine import (
    hardware,
    local_processes,
    shards_model,
    start_accelerator,
)
from vicreg_hf.runtime.output_dir import set_aside
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import TrainingData, open_training_data
from vicreg_hf.training.building.freezing import freeze
from vicreg_hf.training.building.model import (
    adopt_model,
    build_model,
    enable_gradient_checkpointing,
)
from vicreg_hf.training.building.monitor_data import MonitorData, open_monitor_data
from vicreg_hf.training.building.optimizers import create_optimizer
from vicreg_hf.training.building.own_parts import OwnParts, try_loss
from vicreg_hf.training.building.second_branch import create_views
from vicreg_hf.training.building.sharding import shard, without_weights
from vicreg_hf.training.building.starts import (
    Starts,
    default_side,
    load_expanders,
    resolve_starts,
)
from vicreg_hf.training.monitoring.knn import KNNMonitor, missing_for_knn
from vicreg_hf.training.monitoring.label_free import FixedSample
from vicreg_hf.training.monitoring.probe import create_probe
from vicreg_hf.training.monitoring.summary import advice, first_message
from vicreg_hf.training.monitoring.trackers import RECORDS
from vicreg_hf.training.resuming import resume
from vicreg_hf.training.run import Run

ENCODERS = ("encoder", PRIME_DIRECTORY)
BESIDE = ("metrics.jsonl", "config.yaml", "bad_images.jsonl", *RECORDS)
"""Files that a run writes besides its encoders and checkpoints."""
CHECKPOINTS = "checkpoints"
WORTH_COMPILING = 2000
"""Least number of steps left for which compiling the model pays on a GPU."""


def setup(
    args: PretrainingArguments, *, before: int | None = None, own: OwnParts | None = None
) -> Run:
    """Check every setting, load the data, build the model, resume.

    Args:
        before: resume only from checkpoints of earlier steps than this one.
        own: parts of the caller's own in place of those that settings describe.
    """
    started, own = time.perf_counter(), own or OwnParts()
    given = own.facts  # before the model is set to the run's images
    args, starts = resolve_starts(own.fill_in(args), before=before)
    check_architecture(str(args.architecture))
    transformers.utils.logging.disable_progress_bar()
    accelerator = start_accelerator(may_shard=True)
    sharded = shards_model(accelerator)
    if sharded and args.compile_model:
        raise ValueError(
            "compile_model must be false or left out where FSDP shards the model, got true; "
            "leave it out."
        )
    if accelerator.is_main_process:
        _open_repositories(args, starts)
    args, data = open_training_data(
        args, rank=accelerator.process_index, world_size=accelerator.num_processes,
        local_processes=local_processes(accelerator), main_first=main_process_first,
        default_side=default_side(starts), dataset=own.train_dataset,
    )  # fmt: skip
    args, monitor_data = open_monitor_data(args, data, main_process_first)
    _check_keep_best(args, data, monitor_data)
    model, new = _create_model(args, data, accelerator, starts, own)
    average, twin = None, None
    if args.ema_decay is not None:  # timm's foreach update does not take DTensors
        average = ModelEmaV3(model, decay=args.ema_decay, foreach=not sharded)
    if sharded:
        twin = without_weights(model if average is None else average.module)
        for each in [model] if average is None else [model, average.module]:
            shard(each, accelerator.device)
    probe = None
    if args.online_probe:
        probe = create_probe(data.train, data.held_out, model.num_features).to(accelerator.device)
    assert args.base_lr is not None
    assert not isinstance(args.optimizer_args, str)
    optimizer = create_optimizer(
        args.optimizer, model, lr=args.base_lr, weight_decay=args.weight_decay,
        lars_eta=args.lars_eta, lars_clip=args.lars_clip, optimizer_args=args.optimizer_args,
        layer_decay=args.layer_decay,
    )  # fmt: skip
    compiled = accelerator.device.type == "cuda" if args.compile is None else args.compile
    views, paired = create_views(args, model.config, data.pairs, compiled=compiled)
    if views.left_out:
        channels = "1 channel" if args.in_chans == 1 else f"{args.in_chans} channels"
        accelerator.print(
            f"Images of {channels} are seen without {', '.join(views.left_out)}, which need RGB."
        )
    run = Run(
        args, accelerator, model, model, optimizer, data, views, paired,
        _create_monitor(args, data, monitor_data, model.config.pretrained_cfg or {}), probe,
        average, twin, started,
        starts={setting: start.facts for setting, start in starts.items()} | given,
        loss_name=name_of_loss(own.loss),
        terms=try_loss(own.loss, model, accelerator, data.batches.rows_per_process)
        or model.term_names,
    )  # fmt: skip
    assert args.augmentation is not None
    run.sample = FixedSample(
        data, model, preset=args.augmentation, seed=args.seed, num_workers=args.num_workers or 0
    )
    resume(run, before=before)
    for sentence in new if run.step == 0 else ():
        accelerator.print(sentence)
    if _compiles_model(args, accelerator, run.total_steps - run.step):
        model.compile_branches()
    if twin is None:
        run.wrapped, run.optimizer = accelerator.prepare(model, optimizer)
    else:
        if accelerator.native_amp:
            forward: Any = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
            model.forward = forward  # as accelerate prepares other models
        run.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    return run


def _create_model(
    args: PretrainingArguments,
    data: TrainingData,
    accelerator: Accelerator,
    starts: Starts,
    own: OwnParts,
) -> tuple[VICRegModel, list[str]]:
    """The model on the device, as it is trained; and a sentence for each expander that is new."""
    if own.model is None:
        model = build_model(args, data.pairs, sound=data.sound, starts=starts)
    else:
        model = adopt_model(own.model, args, sound=data.sound)
    new = load_expanders(model, starts)
    model.loss = own.loss
    # convolutions are faster in this layout, on CPU too; attention does not mind, and FSDP refuses
    layout = torch.contiguous_format if shards_model(accelerator) else torch.channels_last
    model.to(accelerator.device, memory_format=layout)  # pyright: ignore
    _check_micro_batches(model, data.batches)
    if accelerator.is_main_process:
        check_exportable(model, column=data.pairs.column if data.pairs else None)
    if accelerator.num_processes > 1:
        synchronize(model)
    freeze(model, args.freeze)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model, new


def _open_repositories(args: PretrainingArguments, starts: Starts) -> None:
    """Find out, before any training, whether the encoders can be pushed, and say what will be."""
    if args.push_to_hub:
        names = [str(args.hub_model_id)]
        if args.prime_modality not in (None, "embedding"):
            names.append(f"{args.hub_model_id}{PRIME_SUFFIX}")
        facts = {setting: start.facts for setting, start in starts.items()}
        for name in names:
            full = open_repository(name, private=args.hub_private or None)
            if args.license is not None:
                check_licence_at_hub(args.license, full)
            prime = name != names[0]
            print(describe_run_push(full, asdict(args), facts, prime=prime), flush=True)


def make_output_dir(run: Run) -> None:
    """Make output_dir as the checkpoint left it, and say what begins."""
    main, bad, directory = run.accelerator.is_main_process, run.inputs.bad, run.output_dir
    with writing(directory, remedy="Nothing in it is lost; free some space or choose another."):
        if main:
            _set_aside(run)
        if run.step:
            bad.recall()
            if run.probe is not None:
                run.probe.leave_out(image.row for image in bad.found)
        elif main:
            bad.forget()
        run.log.keep_until(run.step if run.step else -1)
        if main:
            # how this session began is no setting of the run
            settings = replace(run.args, resume="auto", resume_changed=False)
            with replacing(directory / "config.yaml") as aside:
                aside.write_text(settings.to_yaml())
            (directory / CHECKPOINTS).mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=directory / CHECKPOINTS).close()
    _introduce(run)


def _introduce(run: Run) -> None:
    sentence = first_message(
        run.args, parameters=sum(p.numel() for p in run.model.encoder.parameters()),
        trained=sum(p.numel() for p in run.model.encoder.parameters() if p.requires_grad),
        images=run.inputs.train.num_images, step=run.step, total_steps=run.total_steps,
        hardware=hardware(run.accelerator.device, run.accelerator.num_processes),
        start=run.starts.get("init_from", {}).get("name"),
    )  # fmt: skip
    run.accelerator.print(sentence, flush=True)
    if run.model.prime is not None and run.args.freeze is not None:
        second = [(p.numel(), p.requires_grad) for p in run.model.prime.backbone.parameters()]
        run.accelerator.print(
            f"Of the second encoder's {sum(number for number, _ in second):,} parameters "
            f"{sum(number for number, trained in second if trained):,} are trained."
        )
    if run.args.value_range is not None:
        run.accelerator.print(
            f"Values of {run.args.value_range.replace(',', ' to ')} become levels of 0 to 255; "
            "--value_range sets others."
        )
    if run.monitor is None:
        missing = missing_for_knn(run.inputs.train, run.inputs.held_out)
        sentence = (
            f"kNN needs labels, but {missing}, or measure on other images with "
            "--monitor_dataset_name. Rank, alignment and uniformity are measured without labels."
        )
    else:
        sentence = " ".join(filter(None, [
            f"kNN is measured on {run.monitor.subject}.", run.monitor.unlearnt,
        ]))  # fmt: skip
    run.accelerator.print("\n".join([sentence, *advice(run)]), flush=True)


def _set_aside(run: Run) -> None:
    """Move files of an earlier run aside, so that none is lost or taken for this run's."""
    directory, names = run.output_dir, []
    over = any((directory / CHECKPOINTS).glob("step-*"))
    anew = run.step == 0 and (run.args.resume == "never" or not over)
    if anew and (over or any((directory / name).exists() for name in ENCODERS)):
        names += BESIDE
    if run.step < run.total_steps:
        names += ENCODERS  # these have fewer steps, or are another run's
    if anew and over:
        names.append(CHECKPOINTS)  # last: where this is broken off, what is left is still known
    set_aside(directory, names, print)


def _create_monitor(
    args: PretrainingArguments,
    data: TrainingData,
    other: MonitorData | None,
    cfg: dict[str, Any],
) -> KNNMonitor | None:
    """A monitor of the labelled data that are not trained on, if there are any, or of the run's."""
    views: dict[str, Any] = {
        "image_size": args.image_size, "crop_pct": cfg["crop_pct"], "mean": cfg["mean"],
        "std": cfg["std"], "num_workers": args.num_workers or 0,
    }  # fmt: skip
    if other is not None:
        taken = data.images.nbytes if isinstance(data.images, Tensor) else 0
        return KNNMonitor.create(
            other.train, other.train, other.held_out, trained_on=False, taken=taken, **views
        )
    images = data.train if data.pairs else data.images
    return KNNMonitor.create(data.train, images, data.held_out, bad=data.bad, **views)


def _check_keep_best(
    args: PretrainingArguments, data: TrainingData, other: MonitorData | None
) -> None:
    missing = missing_for_knn(data.train, data.held_out)
    if args.keep_best == "knn" and other is None and missing is not None:
        raise ValueError(
            f"keep_best=knn needs images with classes to measure, but {missing}; else name other "
            "images with --monitor_dataset_name, or choose a measure without labels such as "
            "--keep_best effective_rank."
        )


def _compiles_model(args: PretrainingArguments, accelerator: Accelerator, steps_left: int) -> bool:
    """Whether backbone and expander are compiled: as the settings say, or where it pays.

    Either all processes compile or none.
    """
    if args.gradient_checkpointing or shards_model(accelerator):  # else the settings are refused
        return False
    if args.compile_model is None:
        on_gpu = accelerator.device.type == "cuda"
        if not on_gpu or steps_left < WORTH_COMPILING:
            return False
    elif not args.compile_model:
        return False
    fault = compiler_fault(accelerator.device)
    (cannot,) = any_process([fault is not None], accelerator.device)
    if cannot and accelerator.is_local_main_process:
        reason = fault or "in another process"
        warnings.warn(
            f"the model is trained without torch.compile, which failed: {reason}", stacklevel=2
        )
    return not cannot


def _normalises_batches(model: VICRegModel) -> bool:
    """Whether an encoder has batch normalisation, whatever the expanders have."""
    parts = (part for branch in model.branches for part in branch.backbone.modules())
    return any(isinstance(part, _BatchNorm) for part in parts)


def _check_micro_batches(model: VICRegModel, batches: GlobalBatches) -> None:
    smallest = batches.batch_size % batches.micro_batch_size or batches.micro_batch_size
    if smallest == 1 and _normalises_batches(model):
        raise ValueError(
            "micro_batch_size must leave batch normalisation at least 2 images to compare, got "
            f"micro_batch_size={batches.micro_batch_size} and batch_size={batches.batch_size}; "
            f"use {batches.micro_batch_size + 1}."
        )
