"""A pretraining run: all that its loop works on, and all that changes while it goes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from vicreg_hf.checkpoints.writing import CheckpointWriter
from vicreg_hf.data.pairs import PairedInput
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.distributed import Vote
from vicreg_hf.settings.learning_rate import learning_rate
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.building.data import TrainingData
from vicreg_hf.training.monitoring.knn import KNNMonitor
from vicreg_hf.training.monitoring.log import MetricsLog
from vicreg_hf.training.monitoring.probe import OnlineProbe
from vicreg_hf.views.random_views import RandomViews


@dataclass
class Run:
    """What `setup` makes and `fit` uses; only weights, optimiser, probe and step change."""

    args: PretrainingArguments
    accelerator: Accelerator
    model: VICRegModel
    wrapped: torch.nn.Module
    """The model as accelerate prepared it: under autocast, and in DDP on several processes."""
    optimizer: Optimizer
    inputs: TrainingData
    views: RandomViews
    paired: PairedInput | None
    """What becomes of the other half of the samples, where they are pairs."""
    monitor: KNNMonitor | None
    probe: OnlineProbe | None
    log: MetricsLog
    fingerprint: dict[str, Any]
    """Of the training data; a checkpoint remembers it."""
    step: int = 0
    """Optimiser steps taken."""
    shapes_compared: bool = False
    """Whether all processes have been seen to hold views of the same shape."""
    seconds_before: float = 0.0
    """That earlier sessions of this run took."""
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first_step = self.step
        self.writer = CheckpointWriter(
            self.output_dir / "checkpoints", world_size=self.accelerator.num_processes
        )

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

    def vote(self, *flags: bool | Tensor) -> Vote:
        """Ask each flag: whether it is set in any process. Every process must ask."""
        return Vote(flags, self.accelerator.device)

    def agree(self, *flags: bool | Tensor) -> list[bool]:
        """The same, and wait for the answers."""
        return self.vote(*flags).read()

    def warn(self, sentence: str | None) -> None:
        """Say something once, above the progress bar."""
        if sentence and self.accelerator.is_main_process:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)
