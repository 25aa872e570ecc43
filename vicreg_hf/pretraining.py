"""The one training loop: setup, fit, finish.

Everything that changes during a run is in the model, the optimiser and the step number.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from tqdm import tqdm

from vicreg_hf.arguments import PretrainingArguments
from vicreg_hf.cards import CARD_FILE, TrainingRecord, hardware, model_card
from vicreg_hf.checkpointing import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from vicreg_hf.configuration_vicreg import VICRegConfig, encoder_pretrained_cfg
from vicreg_hf.data import SMALL_IMAGE, available_cores, loading_errors, training_views
from vicreg_hf.distributed import SyncBatchNorm, gather_rows
from vicreg_hf.evaluation import alignment, effective_rank, embedding_std, uniformity
from vicreg_hf.gradcache import backward_in_chunks
from vicreg_hf.hub import HubError, open_repository
from vicreg_hf.inputs import Inputs, open_inputs
from vicreg_hf.modeling_vicreg import VICRegModel, VICRegOutput, check_architecture
from vicreg_hf.monitor import KNNMonitor
from vicreg_hf.optim import create_optimizer, learning_rate
from vicreg_hf.pictures import draw_pictures
from vicreg_hf.publishing import (
    check_exportable,
    export_encoder,
    push_model,
    retry_command,
)
from vicreg_hf.randomness import Stream, derive_seed
from vicreg_hf.reporting import Clock, MetricsLog, results, summary
from vicreg_hf.sampler import GlobalBatches
from vicreg_hf.sources import ImageSplit
from vicreg_hf.streaming import ImageStream
from vicreg_hf.views import TwoViews

# Settings a resumed run may change: they say where and how often, not what is computed.
FREE_TO_CHANGE = {
    "output_dir", "resume", "num_workers", "compile", "max_bad_fraction", "logging_steps",
    "save_steps", "knn_steps", "eval_split", "label_column",
    "push_to_hub", "hub_model_id", "hub_private",
    "dataset_name",  # a folder may move; `fingerprint` tells whether it is another
}  # fmt: skip


@dataclass
class Run:
    """What `setup` makes and `fit` uses."""

    args: PretrainingArguments
    accelerator: Accelerator
    model: VICRegModel
    wrapped: torch.nn.Module
    """The model as accelerate prepared it: under autocast, and in DDP on several processes."""
    optimizer: Optimizer
    inputs: Inputs
    views: TwoViews
    monitor: KNNMonitor | None
    log: MetricsLog
    fingerprint: dict[str, Any]
    """Of the training data; a checkpoint remembers it."""
    step: int = 0
    seconds_before: float = 0.0
    """That earlier sessions of this run took."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def batches(self) -> GlobalBatches:
        return self.inputs.batches

    @property
    def total_steps(self) -> int:
        return self.inputs.total_steps

    @property
    def output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def seconds(self) -> float:
        """Of all sessions together."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def lr(self) -> float:
        """The learning rate of the step about to be taken."""
        args = self.args
        assert args.base_lr is not None
        assert args.warmup_epochs is not None
        warmup_steps = round(self.batches.steps_per_epoch * args.warmup_epochs)
        peak = args.base_lr * args.batch_size / 256
        return learning_rate(
            self.step, peak=peak, warmup_steps=warmup_steps, total_steps=self.total_steps
        )


def pretrain(args: PretrainingArguments) -> Path:
    """Pretrain as the settings say, resuming from the newest checkpoint in output_dir.

    Returns:
        The directory of the published encoder.

    Raises:
        ValueError: a setting that cannot be, before any training.
        CheckpointError: resuming was required and nothing valid is there, or the checkpoint is of
            another run, or one could not be written.
        FloatingPointError: the loss is not finite.
        ImageError: too many images cannot be used.
        LoadingError: a loading worker died.
        ExportError: the backbone could not be published, before any training.
        HubError: the encoder cannot be pushed, before any training; or could not be, after it.
    """
    run = setup(replace(args))
    measure(run)
    with loading_errors():  # torch may say anywhere that a worker has died
        fit(run)
    return finish(run)


def setup(args: PretrainingArguments) -> Run:
    """Check every setting, load the data, build the model, resume."""
    started = time.perf_counter()
    check_architecture(args.architecture)
    accelerator = _accelerator()
    output_dir = Path(str(args.output_dir))
    _check_writable(output_dir)
    if args.push_to_hub and accelerator.is_main_process:
        open_repository(str(args.hub_model_id), private=args.hub_private or None)
    inputs = open_inputs(
        args, rank=accelerator.process_index, world_size=accelerator.num_processes,
        local_processes=_local_processes(accelerator), main_first=accelerator.main_process_first,
    )  # fmt: skip
    train, batches = inputs.train, inputs.batches
    # convolutions are faster in this layout, on CPU too; attention does not mind
    model = _build_model(args).to(accelerator.device, memory_format=torch.channels_last)
    _check_micro_batches(model, batches)
    if accelerator.is_main_process:
        check_exportable(model)
    if accelerator.num_processes > 1:
        on_cuda = accelerator.device.type == "cuda"  # torch's own is fused, and for CUDA alone
        (convert_sync_batchnorm if on_cuda else SyncBatchNorm.convert)(model)
    assert args.base_lr is not None
    optimizer = create_optimizer(
        args.optimizer, model, lr=args.base_lr, weight_decay=args.weight_decay
    )
    cfg = model.config.pretrained_cfg
    assert cfg is not None
    assert args.image_size is not None
    assert args.augmentation is not None
    compiled = accelerator.device.type == "cuda" if args.compile is None else args.compile
    views = TwoViews(
        args.image_size, args.augmentation, mean=cfg["mean"], std=cfg["std"], seed=args.seed,
        in_chans=args.in_chans, compile=compiled,
    )  # fmt: skip
    if views.left_out:
        accelerator.print(
            f"Images of {args.in_chans} channels are seen without {', '.join(views.left_out)}, "
            "which need RGB."
        )
    log = MetricsLog(output_dir / "metrics.jsonl", accelerator.is_main_process)
    fingerprint = train.fingerprint()
    step, seconds = _resume(args, accelerator, model, optimizer, log, fingerprint)
    if accelerator.is_main_process:
        (output_dir / "config.yaml").write_text(args.to_yaml())
    wrapped, prepared = accelerator.prepare(model, optimizer)
    monitor = _create_monitor(args, inputs, cfg)
    if step:
        inputs.bad.recall()
    elif accelerator.is_main_process:
        inputs.bad.forget()
    run = Run(
        args, accelerator, model, wrapped, prepared, inputs, views, monitor, log, fingerprint,
        step, seconds, started,
    )  # fmt: skip
    _agree_on_bad_images(run)
    return run


def _create_monitor(
    args: PretrainingArguments, inputs: Inputs, cfg: dict[str, Any]
) -> KNNMonitor | None:
    if isinstance(inputs.train, ImageStream) or isinstance(inputs.images, ImageStream):
        return None
    assert args.image_size is not None
    return KNNMonitor.create(
        inputs.train, inputs.images, inputs.held_out, image_size=args.image_size,
        crop_pct=cfg["crop_pct"], mean=cfg["mean"], std=cfg["std"],
        num_workers=args.num_workers or 0,
    )  # fmt: skip


def _agree_on_bad_images(run: Run) -> None:
    """Every process learns what all have found, and stops if it is too much."""
    images = run.inputs.images
    seen = len(images) if isinstance(images, Tensor) else run.step * run.args.batch_size
    run.inputs.bad.agree(
        gather_object, seen=seen,
        write=run.accelerator.is_main_process, say=run.accelerator.print,
    )  # fmt: skip


def fit(run: Run) -> None:
    """Train from the run's step to its last."""
    args, accelerator = run.args, run.accelerator
    views = training_views(
        run.inputs.images, run.batches, run.views, steps=range(run.step, run.total_steps),
        device=accelerator.device, num_workers=args.num_workers or 0, bad=run.inputs.bad,
    )  # fmt: skip
    bar = tqdm(
        views, "pretraining", run.total_steps, initial=run.step, unit="step",
        disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    run.wrapped.train()
    clock = Clock(2 * args.batch_size)
    for x, x_prime in bar:
        lr = run.lr
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        # Dropout and drop-path draw from torch's generator: keyed too, so that resuming is exact.
        torch.manual_seed(
            derive_seed(
                args.seed, epoch=run.step, index=accelerator.process_index, stream=Stream.DROPOUT
            )
        )
        layout = torch.channels_last
        x, x_prime = x.to(memory_format=layout), x_prime.to(memory_format=layout)
        output = backward(run, x, x_prime)
        _check_finite(output, run.step + 1)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        clock.tick()
        last = run.step == run.total_steps
        if run.step % args.logging_steps == 0 or last:
            row = _metrics(run, output, lr, clock)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            if last or (args.knn_steps and run.step % args.knn_steps == 0):
                row |= _knn(run)
            run.log.add(row)
            clock.restart()
        elif args.knn_steps and run.step % args.knn_steps == 0:
            run.log.add(_place(run) | _knn(run))
            clock.restart()
        if run.step % args.save_steps == 0 or last:
            save(run)
            clock.restart()


def backward(run: Run, x: Tensor, x_prime: Tensor) -> VICRegOutput:
    """The loss of two batches of views, and its gradient in every parameter's `grad`."""
    accelerator, batches = run.accelerator, run.batches
    if batches.micro_batch_size < batches.batch_size:
        return backward_in_chunks(
            run.model, x, x_prime,
            chunk_size=batches.micro_batch_size // accelerator.num_processes,
            wrapped=run.wrapped, backward=accelerator.backward, autocast=accelerator.autocast,
        )  # fmt: skip
    output = run.wrapped(x, x_prime)
    accelerator.backward(output.loss)
    return output


def measure(run: Run) -> None:
    """Before the first step: kNN accuracy of the pixels and of the untrained encoder."""
    if run.step == 0 and run.monitor is not None:
        row = _place(run) | _knn(run)
        if run.accelerator.is_main_process:
            pixels = run.monitor.pixels()
            run.log.add(row if pixels is None else row | {"knn_pixels": pixels})
        run.accelerator.wait_for_everyone()


def save(run: Run) -> None:
    """Write a checkpoint; every process waits for it."""
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {
            "settings": asdict(run.args),
            "data": run.fingerprint,
            "seconds": run.seconds,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        inner = getattr(run.optimizer, "optimizer", run.optimizer)
        save_checkpoint(run.output_dir / "checkpoints", run.step, run.model, inner, state)
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> Path:
    """Write the encoder and its card, say what was reached, and publish."""
    directory = run.output_dir / "encoder"
    fault: Exception | None = None
    if run.accelerator.is_main_process:
        export_encoder(run.model, directory, include_expander=True)
        _write_card(run, directory)
        print(summary(directory, run.log.rows(), run.monitor))
        try:
            _push(run, directory)
        except HubError as error:
            fault = error
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    if fault is not None:
        raise fault
    return directory


def _write_card(run: Run, directory: Path) -> None:
    args, inputs, rows = run.args, run.inputs, run.log.rows()
    train = inputs.train
    pictures = draw_pictures(
        directory, run.model, rows, train=train if isinstance(train, ImageSplit) else None,
        held_out=inputs.held_out,
        num_workers=args.num_workers or 0,
    )  # fmt: skip
    record = TrainingRecord(
        args=args, steps=run.step, seconds=run.seconds,
        images=len(train) if isinstance(train, ImageSplit) else train.num_images,
        hardware=hardware(run.accelerator.device, run.accelerator.num_processes),
        results=results(rows, run.monitor), pictures=pictures,
    )  # fmt: skip
    card = model_card(
        run.model.config, num_features=run.model.num_features, record=record,
        num_parameters=sum(p.numel() for p in run.model.encoder.parameters()),
    )  # fmt: skip
    (directory / CARD_FILE).write_text(str(card), encoding="utf-8")


def _push(run: Run, directory: Path) -> None:
    args = run.args
    if not args.push_to_hub:
        return
    repo_id = str(args.hub_model_id)
    try:
        print(f"\nPublished: {push_model(run.model, repo_id, card=directory)}")
    except HubError as error:
        command = retry_command(args.output_dir or "", repo_id, private=args.hub_private)
        raise HubError(
            f"{error}\nThe encoder is whole in {directory}. Push it again with\n    {command}"
        ) from None


def _accelerator() -> Accelerator:
    transformers.utils.logging.disable_progress_bar()
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(kwargs_handlers=[ddp])
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"every launched process must take part, got WORLD_SIZE={launched} and "
            f"{accelerator.num_processes} in accelerate; see README, 'Several processes'."
        )
    if accelerator.device.type == "cpu":
        # accelerate launch sets OMP_NUM_THREADS=1, which leaves all cores but one idle
        torch.set_num_threads(max(1, available_cores() // _local_processes(accelerator)))
    return accelerator


def _local_processes(accelerator: Accelerator) -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir must be a directory that can be written, got {directory}: {error}."
        ) from error


def _check_micro_batches(model: VICRegModel, batches: GlobalBatches) -> None:
    smallest = batches.batch_size % batches.micro_batch_size or batches.micro_batch_size
    if smallest == 1 and any(isinstance(m, _BatchNorm) for m in model.backbone.modules()):
        raise ValueError(
            "micro_batch_size must leave batch normalisation at least 2 images to compare, got "
            f"micro_batch_size={batches.micro_batch_size} and batch_size={batches.batch_size}; "
            f"use {batches.micro_batch_size + 1}."
        )


def _build_model(args: PretrainingArguments) -> VICRegModel:
    """The model with weights from the seed, taking views of image_size."""
    torch.manual_seed(derive_seed(args.seed, epoch=0, index=0, stream=Stream.MODEL))
    assert args.image_size is not None
    assert not isinstance(args.model_args, str)
    model_args = dict(args.model_args or {})
    method: Any = {
        "expander_dims": args.expander_widths,
        "sim_coeff": args.sim_coeff,
        "std_coeff": args.std_coeff,
        "cov_coeff": args.cov_coeff,
    }

    def build() -> VICRegModel:
        if args.pretrained:
            return VICRegModel.from_timm(args.architecture, model_args=model_args or None, **method)
        config = VICRegConfig(
            architecture=args.architecture, model_args=model_args or None, **method
        )
        return VICRegModel(config)

    model = build()
    cfg = model.config.pretrained_cfg
    assert cfg is not None
    if cfg.get("fixed_input_size") and cfg["input_size"][-1] != args.image_size:
        model_args["img_size"] = args.image_size
        model = build()
    cfg = encoder_pretrained_cfg(model.config.pretrained_cfg or {}, model_args, args.image_size)
    # Small images are seen whole; larger ones are evaluated on the authors' central crop.
    crop_pct = 1.0 if args.image_size <= SMALL_IMAGE else 0.875
    model.config.pretrained_cfg = cfg | {"crop_pct": crop_pct, "interpolation": "bicubic"}
    _check_takes_images(model, args.in_chans, args.image_size)
    return model


@torch.inference_mode()
def _check_takes_images(model: VICRegModel, channels: int, side: int) -> None:
    """Encode one black image, so that what cannot work fails before the data is read."""
    try:
        model.eval()(torch.zeros(1, channels, side, side))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(
            f"the backbone must take images of {channels} x {side} x {side}, but "
            f"{model.config.architecture} with model_args={model.config.model_args} does not: "
            f"{' '.join(str(error).split())}"
        ) from error
    model.train()


def _resume(
    args: PretrainingArguments,
    accelerator: Accelerator,
    model: VICRegModel,
    optimizer: Optimizer,
    log: MetricsLog,
    fingerprint: dict[str, Any],
) -> tuple[int, float]:
    """Load the newest valid checkpoint; the step to go on from, and the seconds it took."""
    folder = Path(str(args.output_dir)) / "checkpoints"
    path, damaged = (None, []) if args.resume == "never" else newest_checkpoint(folder)
    for sentence in damaged:
        accelerator.print(f"warning: {sentence}")
    if path is None:
        if args.resume == "required":
            raise CheckpointError(f"resume=required, but {folder} holds no valid checkpoint.")
        log.keep_until(-1)
        return 0, 0.0
    step, state = read_state(path)
    _check_same_run(args, state["settings"], path)
    if state["data"] != fingerprint:
        raise CheckpointError(
            f"a resumed run must keep its data, but {path} was trained on "
            f"{state['data']['images']} other images, and {args.dataset_name} has "
            f"{fingerprint['images']}. Choose another output_dir, or --resume never to start over."
        )
    load_checkpoint(path, model, optimizer)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    log.keep_until(step)
    accelerator.print(f"Resuming from {path}.")
    return step, state.get("seconds", 0.0)


def _check_same_run(args: PretrainingArguments, saved: dict[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(asdict(args)))
    changed = [
        f"{f.name} was {saved.get(f.name)}, is {now[f.name]}"
        for f in fields(args)
        if f.name not in FREE_TO_CHANGE and saved.get(f.name, now[f.name]) != now[f.name]
    ]
    if changed:
        raise CheckpointError(
            f"a resumed run must keep its settings, but against {path}: {'; '.join(changed)}. "
            "Choose another output_dir, or --resume never to start over."
        )


def _check_finite(output: Any, step: int) -> None:
    # The loss is global, so every process comes to the same answer.
    if not bool(torch.isfinite(output.loss)):
        terms = {k: output[k].item() for k in ("loss", "invariance", "variance", "covariance")}
        raise FloatingPointError(
            f"the loss must be finite, got {terms} at step {step}; lower --base_lr, lengthen "
            "--warmup_epochs, or use bf16 instead of fp16. The last checkpoint is untouched."
        )


def _place(run: Run) -> dict[str, Any]:
    return {"step": run.step, "epoch": run.step / run.batches.steps_per_epoch}


def _metrics(run: Run, output: Any, lr: float, clock: Clock) -> dict[str, Any]:
    rate = clock.rate()
    _agree_on_bad_images(run)
    z, z_prime = (gather_rows(branch.detach()) for branch in output.embeddings)
    return _place(run) | {
        "loss": output.loss.item(),
        "invariance": output.invariance.item(),
        "variance": output.variance.item(),
        "covariance": output.covariance.item(),
        "lr": lr,
        "views_per_second": round(rate, 1),
        "embedding_std": embedding_std(z).item(),
        "effective_rank": effective_rank(z).item(),
        "alignment": alignment(z, z_prime).item(),
        "uniformity": uniformity(z).item(),
        "bad_images": len(run.inputs.bad),
    }


def _knn(run: Run) -> dict[str, float]:
    """Measured by the main process while the others wait."""
    row = {}
    if run.monitor is not None and run.accelerator.is_main_process:
        row["knn"] = run.monitor.accuracy(run.model.encoder, run.accelerator.device)
    run.accelerator.wait_for_everyone()
    return row
