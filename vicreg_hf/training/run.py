"""A pretraining run: everything that its loop works on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch.optim import Optimizer

from vicreg_hf.checkpoints.reading import BestStep
from vicreg_hf.checkpoints.writing import CheckpointWriter
from vicreg_hf.data.pairs import SecondInput
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.loss.autograd import VICRegTerms
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.liveness import StepTimer
from vicreg_hf.settings.learning_rate import learning_rate
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import TrainingData
from vicreg_hf.training.building.sharding import filled
from vicreg_hf.training.monitoring.knn import KNNMonitor
from vicreg_hf.training.monitoring.label_free import FixedSample
from vicreg_hf.training.monitoring.log import MetricsLog
from vicreg_hf.training.monitoring.probe import OnlineProbe
from vicreg_hf.training.monitoring.progress import Progress
from vicreg_hf.training.monitoring.trackers import Trackers
from vicreg_hf.views.random_views import RandomViews


@dataclass
class Run:
    """`setup` makes it, `fit` uses it; only weights, average, optimiser, probe and step change."""

    args: PretrainingArguments
    accelerator: Accelerator
    model: VICRegModel
    wrapped: torch.nn.Module
    """The model as accelerate prepared it: under autocast, and in DDP on several processes; where
    FSDP shards it the model itself."""
    optimizer: Optimizer
    inputs: TrainingData
    views: RandomViews
    paired: SecondInput | None
    """Prepares the second half of each sample, where samples are pairs."""
    monitor: KNNMonitor | None
    probe: OnlineProbe | None
    average: ModelEmaV3 | None = None
    """The moving average of the model's weights and statistics, in eval mode."""
    twin: VICRegModel | None = None
    """Where FSDP shards the model and its average: what is published, a copy whose weights are
    there inside `whole_weights` alone."""
    started: float = field(default_factory=time.perf_counter)
    starts: dict[str, Any] = field(default_factory=dict)
    """Facts of the encoders that the branches start from, by setting; see `Source.facts`."""
    step: int = 0
    """Optimiser steps taken."""
    first_step: int = 0
    """The step from which this session goes on."""
    shapes_compared: bool = False
    """Whether the processes have compared the shapes of their views."""
    sample: FixedSample | None = None
    """Training images that are measured without labels."""
    best: BestStep | None = None
    """The best step so far, where `keep_best` chooses one; the main process knows it."""
    seconds_before: float = 0.0
    """Duration of the earlier sessions of this run."""
    timer: StepTimer = field(default_factory=StepTimer)
    """Times each step, for the watch over the run's processes."""
    terms: tuple[str, ...] = VICRegTerms._fields
    """Names of the loss and of its terms."""
    loss_name: str | None = None
    """Qualified name of a loss of one's own."""
    callbacks: Sequence[Any] = ()
    """Instances of `Callback`."""
    ended_by: str | None = None
    """Why a callback has asked to end the run."""

    def __post_init__(self) -> None:
        self.log = MetricsLog(self.output_dir / "metrics.jsonl", self.accelerator.is_main_process)
        self.progress = Progress(
            self.args, self.log, total_steps=self.total_steps, measures=True,
            terms=self.terms[1:], on_cpu=self.accelerator.device.type == "cpu",
        )  # fmt: skip
        self.trackers = Trackers(self.args.trackers, self.output_dir)
        self.fingerprint = self.inputs.fingerprint()
        """Identifies the training data; a checkpoint remembers it."""
        self.writer = CheckpointWriter(
            self.output_dir / "checkpoints", world_size=self.accelerator.num_processes,
            sharded=self.twin is not None,
        )  # fmt: skip

    @property
    def published(self) -> VICRegModel:
        """The model that is measured and published: the average if there is one."""
        return self._followed if self.twin is None else self.twin

    @property
    def _followed(self) -> VICRegModel:
        return self.model if self.average is None else cast(VICRegModel, self.average.module)

    def whole_weights(self, *, main_process_only: bool = False) -> AbstractContextManager[None]:
        """The context in which `published` has its weights; every process must enter it.

        It is needed where FSDP shards the model, and else changes nothing.

        Args:
            main_process_only: other processes do not need them.
        """
        if self.twin is None:
            return nullcontext()
        return filled(self.twin, self._followed, main_process_only=main_process_only)

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
    def inner_optimizer(self) -> Optimizer:
        """The optimiser itself, without what accelerate wraps it in."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def request_stop(self, reason: str) -> None:
        """Ask for the end of the run after the present step; encoder and card are written.

        Args:
            reason: of a callback, which a run that is started again repeats.
        """
        self.ended_by = self.ended_by or reason

    @property
    def reduced(self) -> bool:
        """Whether photographs are decoded at a part of their size, where crops allow it."""
        return self.args.decode == "reduced" and self.inputs.sound is None

    @property
    def seconds(self) -> float:
        """Duration of all sessions so far."""
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
