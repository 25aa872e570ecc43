"""VICRegModel in transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import config, same_state
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from vicreg_hf import LogTerms, TwoViews, VICRegModel, ViewCollator

pytestmark = pytest.mark.usefixtures("one_core")


DATA: Any = [
    {"image": image, "row": row}
    for row, image in enumerate(
        torch.randint(256, (24, 3, 40, 36), generator=torch.Generator().manual_seed(0)).byte()
    )
]


class Spoil(TrainerCallback):
    """Makes a model worse than the one that was saved before."""

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        if given[1].global_step == 3:
            torch.nn.init.constant_(kwargs["model"].expander[0].weight, torch.nan)


def trainer(directory: Path, seed: int, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=8, dataloader_drop_last=True, report_to="none",
        use_cpu=True, disable_tqdm=True, save_steps=2, dataloader_pin_memory=False,
        remove_unused_columns=False, logging_steps=1, **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = VICRegModel(config())
    model.set_image_size(32)
    collate = ViewCollator(TwoViews.for_model(model, "cifar"))
    return Trainer(
        model, args, train_dataset=DATA[:20], eval_dataset=DATA, data_collator=collate,
        callbacks=[collate, LogTerms()],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_logs_resumes_to_the_same_bits_and_takes_the_best_model(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 0, max_steps=5)
    whole.train()
    first = whole.state.log_history[0]
    total = 25 * (first["invariance"] + first["variance"]) + first["covariance"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)
    model: Any = whole.model
    assert same_state(VICRegModel.from_pretrained(tmp_path / "whole/checkpoint-4"), model) is False
    assert AutoModel.from_pretrained(tmp_path / "whole/checkpoint-4") is not None

    resumed = trainer(tmp_path / "whole", 1, max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    again: Any = resumed.model
    assert same_state(again, model)

    best = trainer(
        tmp_path / "best", 0, max_steps=4, load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=2,
    )  # fmt: skip
    best.add_callback(Spoil())
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "best/checkpoint-2")
    chosen: Any = best.model
    assert same_state(VICRegModel.from_pretrained(tmp_path / "best/checkpoint-2"), chosen)
