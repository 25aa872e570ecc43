"""Linear evaluation and fine-tuning: the authors' recipe, on one process and on several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import DatasetDict
from gloo import GlooPool
from pictures import png, table_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import image_split
from vicreg_hf.evaluation.classifier import create_head
from vicreg_hf.evaluation.finetuning import FinetuneResult, finetune
from vicreg_hf.settings.finetuning import FinetuneSettings
from vicreg_hf.views.presets import ViewRecipe
from vicreg_hf.views.random_views import RandomViews

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
QUICK = FinetuneSettings(epochs=4, batch_size=12, lr_head=0.5, weight_decay=0.01, seed=3)
TUNED = replace(QUICK, lr_backbone=0.1)


class Encoder(nn.Module):
    """Four features of edges and colours, smooth, so that rounding stays rounding as it trains.

    It notes in which mode it was used.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.0)
            self.unused = nn.Linear(2, 2)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.norm.training, torch.is_grad_enabled()))
        return self.drop(F.softplus(self.norm(self.conv(x))).mean((2, 3)))


def two_classes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise that is dark or light, (count, 3, 12, 12), and which."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(2, (count,), generator=generator)
    noise = torch.randint(128, (count, 3, 12, 12), generator=generator)
    return (noise + 127 * kinds.view(-1, 1, 1, 1)).byte(), kinds


TRAIN, LABELS = two_classes(40)
TEST, TEST_LABELS = two_classes(21, seed=1)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(settings: FinetuneSettings = QUICK, **changes: Any) -> FinetuneResult:
    given: dict[str, Any] = {
        "encoder": Encoder(), "train": TRAIN, "train_labels": LABELS, "test": TEST,
        "num_classes": 2, "num_features": 4, "image_size": 12, "crop_pct": 1.0,
        "mean": MEAN, "std": STD,
    }  # fmt: skip
    return finetune(**given | changes, settings=settings, accelerator=Accelerator(cpu=True))


def accuracy(result: FinetuneResult) -> float:
    return (result.predictions == TEST_LABELS).float().mean().item()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of equal tensors."""
    assert one.keys() == other.keys()
    return [name for name in one if torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("settings", "was_training"), [(QUICK, True), (QUICK, False), (TUNED, False)]
)
def test_a_copy_is_classified_or_tuned(settings: FinetuneSettings, was_training: bool) -> None:
    encoder = Encoder().train(was_training)
    before = state_of(encoder)
    result = trained(settings, encoder=encoder)
    assert accuracy(result) > 0.9
    used: Any = result.model
    kept = list(before) if settings.frozen else ["unused.weight", "unused.bias"]
    assert same(state_of(used.encoder), before) == kept  # BatchNorm's statistics too
    # whether in training mode, and with gradients; the first is a look at the features' shape
    modes = {(False, False)} | (set() if settings.frozen else {(True, True)})
    assert set(used.encoder.modes[1:]) == modes
    assert same(state_of(encoder), before) == list(before)
    assert encoder.training == was_training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert not encoder.modes


def test_bfloat16_is_of_the_encoder_and_not_of_the_classifier() -> None:
    exact, coarse = (trained(TUNED, bf16=bf16) for bf16 in (False, True))
    assert coarse.losses != exact.losses
    assert coarse.losses == pytest.approx(exact.losses, rel=0.05)
    assert coarse.logits.dtype == torch.float32
    assert not torch.equal(coarse.logits.bfloat16().float(), coarse.logits)


def test_the_classifier_begins_as_the_authors() -> None:
    head = create_head(200, 100, seed=0)
    assert head.bias.count_nonzero() == 0
    assert head.weight.mean().item() == pytest.approx(0, abs=4e-4)  # five standard errors
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    kurtosis = (head.weight / 0.01).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.2)  # normal; 1.8 if uniform
    assert not torch.equal(create_head(200, 100, seed=1).weight, head.weight)


def reference(settings: FinetuneSettings, rows: Tensor) -> tuple[list[float], Tensor]:
    """The authors' evaluate.py on the same crops: losses of epochs, logits of test images."""
    backbone, head = Encoder(), create_head(4, 2, seed=settings.seed)
    model = nn.Sequential(backbone, head)
    parameters: list[dict[str, Any]] = [{"params": head.parameters(), "lr": settings.lr_head}]
    if settings.lr_backbone:
        parameters.append({"params": backbone.parameters(), "lr": settings.lr_backbone})
    optimizer = torch.optim.SGD(parameters, 0, momentum=0.9, weight_decay=settings.weight_decay)
    scheduler = CosineAnnealingLR(optimizer, settings.epochs)
    batches = GlobalBatches(len(rows), settings.batch_size, seed=settings.seed)
    recipe = ViewRecipe(jitter=0, grayscale=0)
    views = RandomViews[tuple[Tensor]](12, (recipe,), mean=MEAN, std=STD, seed=settings.seed)
    losses, step = [], 0
    for epoch in range(settings.epochs):
        backbone.train(settings.lr_backbone > 0)
        total = 0.0
        for _ in range(batches.steps_per_epoch):
            chosen = rows[torch.from_numpy(batches.batch(step)[1])]
            (x,) = views(TRAIN[chosen], chosen.numpy(), epoch)
            loss = nn.CrossEntropyLoss()(model(x), LABELS[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / batches.steps_per_epoch
            step += 1
        scheduler.step()
        losses.append(total)
    normal = (TEST / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return losses, model.eval()(normal)


@pytest.mark.parametrize(
    ("settings", "part"), [(QUICK, slice(None)), (TUNED, slice(3, 31))], ids=["frozen", "tuned"]
)
def test_training_is_the_authors_on_the_same_crops(settings: FinetuneSettings, part: slice) -> None:
    rows = torch.arange(len(TRAIN))[part]
    losses, logits = reference(settings, rows)
    result = trained(settings, rows=rows.numpy())
    assert result.batch_size == 12
    assert result.losses == pytest.approx(losses, rel=2e-5)
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-5)


def test_crops_order_and_dropout_follow_the_seed_alone() -> None:
    encoder = Encoder()
    encoder.drop.p = 0.5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = trained(TUNED, encoder=encoder)
        assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
        torch.manual_seed(1)
        assert trained(TUNED, encoder=encoder).losses == first.losses
    assert trained(replace(TUNED, seed=4), encoder=encoder).losses != first.losses
    assert first.losses != trained(TUNED).losses
    plain, frozen = trained(), trained(encoder=encoder)
    assert frozen.losses == plain.losses  # a frozen encoder has no dropout


def test_a_subset_smaller_than_a_batch_is_the_batch() -> None:
    rows = np.arange(0, 40, 4)
    labels = torch.full_like(LABELS, -1)
    labels[rows] = LABELS[rows]  # nothing else is known, or looked at
    result = trained(replace(QUICK, epochs=40), rows=rows, train_labels=labels)
    assert (result.batch_size, len(result.losses)) == (10, 40)
    assert accuracy(result) > 0.9


def test_what_replaces_a_bad_image_is_not_taken_for_its_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells: list[bytes | None] = [png(image) for image in TRAIN]
    labels = LABELS.clone()
    for row in range(0, 40, 3):
        cells[row], labels[row] = b"<html>404</html>", 2  # a class that no other image has
    table = DatasetDict({"train": table_of(cells)})
    split = image_split(table, "train", dataset_name="noise")
    given: Any = {"train_labels": labels, "num_classes": 3}
    left_out: Any = trained(train=split, **given).model
    # the gradient of a class that is never right only lowers it
    assert left_out.head.bias[2] < -0.1
    assert "14 images could not be used and were left out" in capsys.readouterr().out
    learned: Any = trained(train=load_in_memory(split), **given).model
    assert learned.head.bias[2] > left_out.head.bias[2] + 0.1


def told(settings: FinetuneSettings, test: Tensor) -> dict[str, Any]:
    """A training with an image that cannot be used, in values that another process can be sent."""
    cells: list[bytes | None] = [png(image) for image in TRAIN]
    cells[7] = b""
    split = image_split(DatasetDict({"train": table_of(cells)}), "train", dataset_name="noise")
    result = trained(settings, train=split, test=test)
    model: Any = result.model
    return {
        "losses": result.losses, "logits": result.logits, "state": state_of(model.encoder),
        "modes": set(model.encoder.modes[1:]),
    }  # fmt: skip


def told_by_rank(settings: FinetuneSettings, test: Tensor) -> dict[str, Any]:
    """The same in a process of the pool, as `accelerate launch` starts it."""
    rank = str(torch.distributed.get_rank())
    forget_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK"):
            patch.setenv(name, rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, "2")
        patch.setenv("OMP_NUM_THREADS", "1")
        assert Accelerator(cpu=True).num_processes == 2
        found = told(settings, test)
    forget_accelerator()
    return found


@pytest.mark.parametrize(
    ("settings", "test"), [(QUICK, TEST[:1]), (TUNED, TEST)], ids=["frozen", "tuned"]
)
def test_two_processes_do_what_one_does(
    gloo: GlooPool, settings: FinetuneSettings, test: Tensor
) -> None:
    """The second process of the frozen encoder has no test image."""
    one = told(settings, test)
    for together in gloo.run(2, told_by_rank, settings, test):
        assert together["losses"] == pytest.approx(one["losses"], rel=2e-5)
        for name in ("logits", "state"):
            torch.testing.assert_close(together[name], one[name], rtol=1e-4, atol=1e-5)
        assert together["modes"] == one["modes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": LABELS[:3]}, "one label, got 40 images and 3 labels"),
        ({"train_labels": LABELS + 1}, "labels must be from 0 to 1, got 2"),
        ({"rows": [0, 40]}, "rows must be from 0 to 39, got 40"),
        ({"rows": [3]}, "at least 2 images per process, got 1 images"),
        ({"num_features": 5}, r"shape \(2, 5\) for images of .*\(2, 3, 12, 12\), got \(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(**changes)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(FloatingPointError, match=r"in epoch 1 of 4; lower lr_head=1e\+30\.$"):
        trained(replace(QUICK, lr_head=1e30))
    broken = Encoder()
    nn.init.constant_(broken.conv.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"got nan .*lr_head=0\.5 or lr_backbone=0\.1"):
        trained(TUNED, encoder=broken)
