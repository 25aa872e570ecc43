"""Parts of one's own in a run: a model, a data set, a loss, and what contradicts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from families import config
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv
from workflow import metrics

from vicreg_hf import PretrainingArguments, VICRegModel, pretrain
from vicreg_hf.checkpoints.reading import CheckpointError
from vicreg_hf.training.building.data import open_training_data, varies
from vicreg_hf.training.building.own_parts import OwnParts

LEVELS = torch.randint(256, (24, 3, 32, 36), generator=torch.Generator().manual_seed(0)).byte()
FORMS: dict[str, Any] = {
    "tensor": lambda row: LEVELS[row],
    "PIL in a tuple": lambda row: (tv.to_pil_image(LEVELS[row]), row % 2),
    "float in a dict": lambda row: {"image": LEVELS[row] / 255, "label": torch.tensor(row % 2)},
    "deep": lambda row: [LEVELS[row].int() * 256 if row else LEVELS[row].int() * 0],
}


class Items(Dataset[Any]):
    """Items of a form, of which row 7 cannot be read."""

    def __init__(self, form: str) -> None:
        self.item = FORMS[form]

    def __len__(self) -> int:
        return len(LEVELS)

    def __getitem__(self, row: int) -> Any:
        if row == 7:
            raise OSError("the disk is gone")
        return self.item(row)


class Flipping(Items):
    """Items that come otherwise each time."""

    def __getitem__(self, row: int) -> Any:
        return self.item(row).roll(int(torch.randint(30, ())), -1)


def arguments(output_dir: Path | str = "runs/demo", **settings: Any) -> PretrainingArguments:
    given = {"batch_size": 8, "image_size": 32, "num_workers": 0, "max_bad_fraction": 0.1}
    return PretrainingArguments(output_dir=str(output_dir), **given | settings)


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form_are_the_same_images(form: str) -> None:
    limits = {"value_range": "0,65280"} if form == "deep" else {}
    own = OwnParts(train_dataset=Items(form))
    args = own.fill_in(arguments(train_split="train[:20]", eval_split="train[20:]", **limits))
    _, data = open_training_data(args, dataset=own.train_dataset)
    assert args.output_dir == "runs/Items"
    images = data.first_images([1, 2])
    assert torch.equal(torch.stack(images), LEVELS[1:3])
    train: Any = data.train
    (bad,) = train.try_read([7])
    assert bad.reason == "the data set raised OSError: the disk is gone"
    assert data.held_out is not None
    labels = data.held_out.labels
    assert (labels is None) == (form in ("tensor", "deep"))
    assert labels is None or labels.tolist() == [0, 1, 0, 1]


def test_items_that_vary_are_read_anew_and_known_by_their_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = OwnParts(train_dataset=Flipping("tensor"))
    _, data = open_training_data(own.fill_in(arguments()), dataset=own.train_dataset)
    assert varies(data.train)  # pyright: ignore[reportArgumentType]
    assert not isinstance(data.images, Tensor)
    assert data.fingerprint() == {"images": 24, "sha256": "varies"}
    assert "a resumed run is not exact" in capsys.readouterr().err


def test_a_run_starts_from_the_model_and_logs_the_terms_of_the_loss(tmp_path: Path) -> None:
    def distance(z: Tensor, z_prime: Tensor) -> dict[str, Tensor]:
        return {"loss": 2 * (z - z_prime).square().mean(), "half": (z - z_prime).square().mean()}

    model = VICRegModel(config(expander_dims=[16, 16]))
    before = {name: value.clone() for name, value in model.named_parameters()}
    args = arguments(tmp_path, max_steps=2, base_lr=0.0, logging_steps=1, micro_batch_size=4)
    table = datasets.Dataset.from_dict({"picture": list(map(tv.to_pil_image, LEVELS))})
    pretrain(args, model=model, train_dataset=table, loss=distance)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    _, row, _ = metrics(tmp_path)
    assert row["loss"] == pytest.approx(2 * row["half"])
    assert "the loss `" in (tmp_path / "encoder/README.md").read_text()
    with pytest.raises(CheckpointError, match=r"the loss was .*distance, is VICReg"):
        pretrain(args, model=model, train_dataset=table)


def test_the_card_states_the_terms_of_a_model_that_was_given(tmp_path: Path) -> None:
    model = VICRegModel(config())
    model.config.pretrained_cfg |= {"license": "cc-by-nc-4.0"}  # pyright: ignore
    args = arguments(tmp_path, max_steps=1)
    pretrain(args, model=model, train_dataset=Items("tensor"))
    card = (tmp_path / "encoder/README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "untrained" not in card


def constant(z: Tensor, _: Tensor) -> Tensor:
    return z.detach().mean()


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, {}, "model must be a VICRegModel, got Linear"),
        ({"loss": torch.nn.PReLU()}, {}, "loss must have no parameters to train"),
        ({"loss": torch.nn.MSELoss}, {}, "loss must be a function of two tensors"),
        ({"loss": constant}, {}, "loss must have a gradient"),
        ({"loss": lambda z, _: {"loss": z.mean(), "lr": 1}}, {}, "otherwise .* own, got lr"),
        ({"model": "own"}, {"architecture": "resnet18"}, "architecture must be left out with mod"),
        ({"model": "own"}, {"expander_dims": "8-8"}, "expander_dims must be left out with model"),
        ({"model": "own"}, {"pretrained": True}, "pretrained and init_from must be left out with"),
        ({"model": "own"}, {"weights": "separate"}, "model must have one branch"),
        ({"train_dataset": []}, {}, "train_dataset must hold images, got an empty list"),
        ({"train_dataset": iter([1])}, {}, "train_dataset must have a length and items by number"),
        ({"train_dataset": ["a"]}, {}, "an item of a data set must be an image of PIL or a tensor"),
        ({"train_dataset": [{"picture": 0}]}, {}, "must hold its image as 'image', got picture"),
        ({"train_dataset": [0]}, {"dataset_name": "org/x"}, "dataset_name, .* must be left out"),
    ],
)
def test_what_cannot_be_or_contradicts_is_refused_before_training(
    parts: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if parts.get("model") == "own":
        parts = {"model": VICRegModel(config())}
    elif "model" not in parts:
        settings = {"architecture": "test_resnet", "expander_dims": "8-8"} | settings
    given: dict[str, Any] = {"train_dataset": Items("tensor")} | parts
    with pytest.raises(ValueError, match=message):
        pretrain(arguments(tmp_path, **settings), **given)
