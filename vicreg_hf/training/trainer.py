# ruff: noqa: ARG002 - Trainer names what it gives to callbacks
"""What a `VICRegModel` needs in transformers' own Trainer: views of each batch, and its terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vicreg_hf.data.opening.items import IMAGE, image_of
from vicreg_hf.modeling_vicreg import VICRegOutput
from vicreg_hf.views.two_views import TwoViews


class ViewCollator(TrainerCallback):
    """Makes the two views of a batch of images: a data collator, to be a callback as well.

    As a callback it learns the epoch. Where samples are dicts with a row number, views are drawn
    by seed, epoch and row, so that a resumed run has the same; others are drawn from torch's
    generator, whose state Trainer saves. Trainer needs remove_unused_columns=False.

    Args:
        views: such as `TwoViews.for_model(model)`.
        image: the image's name in samples that are dicts; of tuples the first is taken.
        row: the row number's name.

    Example:
        >>> collate = ViewCollator(TwoViews.for_model(model))
        >>> Trainer(model, args, data_collator=collate, callbacks=[collate], train_dataset=data)
    """

    def __init__(self, views: TwoViews, *, image: str = IMAGE, row: str = "row") -> None:
        self.views, self.image, self.row = views, image, row
        # shared, as loading workers may outlive an epoch
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are made."""
        return int(self._epoch)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """The views of B samples, each (B, C, S, S), by the names that the model takes.

        Where views say where they lie, as a local loss needs it, these are `places`.

        Raises:
            ValueError: samples without an image, or as for `TwoViews`.
        """
        images = [image_of(sample, self.image) for sample in samples]
        keyed = all(isinstance(sample, Mapping) and self.row in sample for sample in samples)
        rows = [int(sample[self.row]) for sample in samples] if keyed else None
        names = ("pixel_values", "pixel_values_prime", "places")
        return dict(zip(names, self.views(images, rows, self.epoch), strict=False))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch.fill_(int(state.epoch or 0))


class LogTerms(TrainerCallback):
    """Logs the terms of the loss beside it, each the mean over the steps since the last log.

    Trackers of `report_to` are called before other callbacks and do not see the terms; give them
    after this one instead, as in callbacks=[LogTerms(), TensorBoardCallback()] with
    report_to="none".
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sums, self._count = {}, 0
        self._hook = kwargs["model"].register_forward_hook(self._add)

    def _add(self, model: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if model.training and isinstance(output, VICRegOutput) and output.loss is not None:
            self._count += 1
            for name, value in output.scalars.items():
                self._sums[name] = self._sums.get(name, 0) + value

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" in logs and self._count:
            terms = {k: v.item() / self._count for k, v in self._sums.items() if k not in logs}
            logs.update(terms)
            state.log_history[-1].update(terms)
            self._sums, self._count = {}, 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
