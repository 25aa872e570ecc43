"""VICRegModel in transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import config, same_state
from transformers import Trainer, TrainingArguments

from vicreg_hf import VICRegModel

pytestmark = pytest.mark.usefixtures("one_core")


def trainer(directory: Path, seed: int, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=8, dataloader_drop_last=True, report_to="none",
        use_cpu=True, disable_tqdm=True, save_steps=2, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    views = torch.randn(2, 20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data: Any = [{"pixel_values": x, "pixel_values_prime": y} for x, y in zip(*views, strict=True)]
    torch.manual_seed(seed)
    return Trainer(VICRegModel(config()), args, train_dataset=data, eval_dataset=data[:16])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_trains_evaluates_and_saves_but_does_not_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, 0, max_steps=2)
    first.train()
    assert 0 < first.evaluate()["eval_loss"] < 1000
    model: Any = first.model
    assert same_state(VICRegModel.from_pretrained(tmp_path / "checkpoint-2"), model)
    # it would go on from random weights
    with pytest.raises(ValueError, match="the weights of a published encoder alone"):
        trainer(tmp_path, 1, max_steps=4).train(resume_from_checkpoint=True)
