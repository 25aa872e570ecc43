"""VICRegModel in transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from vicreg_hf import VICRegConfig, VICRegModel

pytestmark = pytest.mark.usefixtures("one_core")


def model(seed: int) -> VICRegModel:
    torch.manual_seed(seed)
    return VICRegModel(VICRegConfig(architecture="test_resnet", expander_dims=[8, 8]))


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    views = torch.randn(2, count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": x, "pixel_values_prime": y} for x, y in zip(*views, strict=True)]


def trainer(directory: Path, *, seed: int = 0, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(directory), per_device_train_batch_size=8, dataloader_drop_last=True, report_to="none",
        use_cpu=True, disable_tqdm=True, save_steps=2, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return Trainer(model(seed), args, train_dataset=samples(20), eval_dataset=samples(16))  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_trains_evaluates_and_saves_but_does_not_resume(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=2)
    first.train()
    assert 0 < first.evaluate()["eval_loss"] < 1000
    saved = VICRegModel.from_pretrained(tmp_path / "checkpoint-2")
    own = first.model.state_dict()  # pyright: ignore[reportOptionalMemberAccess]
    assert saved.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in saved.state_dict().items())
    # it would go on from random weights
    with pytest.raises(ValueError, match="the weights of a published encoder alone"):
        trainer(tmp_path, seed=1, max_steps=4).train(resume_from_checkpoint=True)
