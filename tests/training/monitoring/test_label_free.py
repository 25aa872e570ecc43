"""What is measured without labels: of which images, and that it is what the formulas say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from pictures import photographs, png, table_of

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.memory import load_in_memory
from vicreg_hf.data.sampler import GlobalBatches
from vicreg_hf.data.splits import image_split
from vicreg_hf.data.streams import image_stream
from vicreg_hf.training.building.data import TrainingData
from vicreg_hf.training.monitoring import label_free
from vicreg_hf.training.monitoring.label_free import EPOCH, FixedSample
from vicreg_hf.views.two_views import TwoViews

CPU = torch.device("cpu")
IMAGES = list(photographs(40, 32, 32))


@pytest.fixture
def model() -> VICRegModel:
    torch.manual_seed(0)
    config = VICRegConfig(architecture="test_resnet", expander_dims=[16, 16])
    model = VICRegModel(config)
    model.set_image_size(32)
    assert config.pretrained_cfg is not None
    config.pretrained_cfg["crop_pct"] = 1.0
    return model


def sample_of(model: VICRegModel, kind: str, num_workers: int = 0) -> FixedSample:
    splits: Any = DatasetDict({"train": table_of([png(image) for image in IMAGES])})
    if kind == "stream":
        splits = {"train": splits["train"].to_iterable_dataset()}
        train: Any = image_stream(splits, "train", dataset_name="pieces")
    else:
        train = image_split(splits, "train", dataset_name="pieces")
    images: Any = load_in_memory(train) if kind == "memory" else train
    batches = GlobalBatches(40, 8, seed=0, rank=0, world_size=1)
    data = TrainingData(train, images, None, batches, 1, BadImages(40, 1.0, None))
    return FixedSample(data, model, preset="cifar", seed=3, num_workers=num_workers)


def rankme(x: torch.Tensor) -> float:
    """Eq. 1-3 of the paper, by a singular value decomposition."""
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = values / values.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def test_it_is_what_the_formulas_say_of_evaluation_views_and_of_two_keyed_views(
    model: VICRegModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_free, "AT_ONCE", 7)
    monkeypatch.setattr(label_free, "MOST", 30)
    monkeypatch.setattr(label_free, "MOST_PAIRED", 10)
    model.train()
    sample = sample_of(model, "decoded")
    found = sample.measure(model, CPU)
    assert model.encoder.training  # as before
    assert sample.description == "30 images of pieces (train) without augmentation"
    rows = label_free.permutation(40, seed=0, epoch=0, stream=label_free.Stream.SPLIT)[:30]
    model.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in sample.normalisation.values())
    with torch.inference_mode():
        y = model.encoder((torch.stack([IMAGES[row] for row in rows]) / 255 - mean) / std)
        paired = torch.stack([IMAGES[row] for row in np.sort(rows[:10])])
        views = TwoViews(32, "cifar", seed=3, **sample.normalisation)(paired, np.arange(10), EPOCH)
        z, z_prime = (torch.nn.functional.normalize(model.encoder(view)) for view in views)
        unit = torch.nn.functional.normalize(y)
        pairs = torch.pdist(unit).square().mul(-2).exp().mean().log()
        embeddings = model.expander(y)
    assert found["sample_effective_rank"] == pytest.approx(rankme(y), rel=1e-3)
    assert found["sample_embedding_effective_rank"] == pytest.approx(rankme(embeddings), rel=1e-3)
    distance = (z - z_prime).square().sum(1).mean().item()
    assert found["sample_alignment"] == pytest.approx(distance, rel=1e-3)
    assert found["sample_uniformity"] == pytest.approx(pairs.item(), rel=1e-3)


def test_where_images_are_read_from_changes_nothing(model: VICRegModel) -> None:
    expected = sample_of(model, "memory").measure(model, CPU)
    again = sample_of(model, "decoded", num_workers=1)
    assert again.measure(model, CPU) == expected
    monitored = sample_of(model, "stream")
    first = monitored.measure(model, CPU)  # the same images in another order
    assert first["sample_effective_rank"] == pytest.approx(expected["sample_effective_rank"])
    assert monitored.measure(model, CPU) == first == sample_of(model, "stream").measure(model, CPU)


def test_features_that_are_not_finite_have_no_rank_and_end_no_run(model: VICRegModel) -> None:
    sample = sample_of(model, "memory")
    torch.nn.init.constant_(next(model.encoder.parameters()), torch.inf)
    assert all(np.isnan(value) for value in sample.measure(model, CPU).values())
