"""The online probe: it measures the encoder, and the encoder is as if it were not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from gloo import GlooPool
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from workflow import WHOLE, assert_same_file, metrics, train, without, write_images

from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.training.monitoring.probe import OnlineProbe

pytestmark = pytest.mark.usefixtures("one_core")

OWN = {"probe", "probe_loss"}
"""Keys of a row that the probe adds."""


def relabelled(images: Path, folder: Path, labels: list[int] | None, *splits: str) -> Path:
    """The same images in some splits, and other labels for those trained on, or none."""
    folder.mkdir()
    for split in splits:
        table: Any = datasets.Dataset.from_parquet(str(images / f"{split}.parquet"))
        if split == "train" or labels is None:
            kind, table = table.features["kind"], table.remove_columns("kind")
            if labels is not None:
                table = table.add_column("kind", labels).cast_column("kind", kind)
        table.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def otherwise(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images with labels by chance."""
    labels = np.random.default_rng(1).integers(2, size=64).tolist()
    return relabelled(images, tmp_path_factory.mktemp("data") / "images", labels, "train", "test")


# Nothing of it reaches the encoder


@pytest.mark.parametrize("change", ["no probe", "other labels"])
def test_training_is_the_same_bit_for_bit(
    change: str, images: Path, otherwise: Path, whole_run: Path, tmp_path: Path
) -> None:
    if change == "no probe":
        rows = train(images, tmp_path, *WHOLE, "--online_probe=false")
        keys = OWN
        assert not any(OWN & row.keys() for row in rows)
        assert not (tmp_path / "checkpoints" / "step-8" / "probe.safetensors").exists()
    else:
        rows = train(otherwise, tmp_path, *WHOLE)
        keys = OWN | {"knn", "knn_pixels", "knn_images"}
        assert rows[-1]["probe_loss"] != metrics(whole_run)[-1]["probe_loss"]
    for name in ("model", "optimizer"):
        file = Path("checkpoints", "step-8", f"{name}.safetensors")
        assert_same_file(tmp_path / file, whole_run / file)
    assert without(keys, tmp_path) == without(keys, whole_run)


# It learns


def test_it_tells_dark_from_light(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = ["--max_steps=40", "--save_steps=40", "--knn_steps=40"]
    rows = train(images, tmp_path, *WHOLE, *length)
    assert "probe" not in rows[0]  # before it learns
    assert rows[1]["probe_loss"] == pytest.approx(np.log(2))
    assert np.mean([row["probe_loss"] for row in rows[-8:]]) < 0.4
    assert rows[-1]["probe"] > 0.9
    shown = f"{100 * rows[-1]['probe']:.1f} %"
    assert f"online linear probe accuracy: {shown} (" in capsys.readouterr().out
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert f"| online linear probe accuracy | {shown} |" in card


def blobs(*, seed: int = 0, count: int = 2400) -> tuple[Tensor, Tensor]:
    """Representations of three classes that overlap, in dimensions of different scale."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=count)
    centres = np.random.default_rng(7).normal(size=(3, 10))
    scale = np.logspace(-1, 1, 10)
    features = (centres[labels] + random.normal(size=(count, 10))) * scale + 3 * scale
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def test_it_comes_near_to_logistic_regression_and_learns_only_from_images_with_a_class() -> None:
    features, labels = blobs()
    unseen, truth = blobs(seed=1)
    known = torch.from_numpy(np.random.default_rng(3).random(len(labels)) < 0.3)
    given = (torch.where(known, labels, (labels + 1) % 3), torch.where(known, labels, -1), labels)
    wrong, unknown, whole = (OnlineProbe(g, ("a", "b", "c"), features.shape[1]) for g in given)
    wrong.leave_out([None, *(~known).nonzero().flatten().tolist()])
    order = np.random.default_rng(2)
    for _ in range(400):
        rows = order.integers(len(labels), size=64)
        for probe in (wrong, unknown, whole):
            probe.learn(features[rows], rows)
    torch.testing.assert_close(wrong.weight, unknown.weight, rtol=0, atol=0)
    mean, std = features.mean(0), features.std(0)
    best = LogisticRegression().fit((features - mean) / std, labels)
    expected = best.score((unseen - mean) / std, truth)
    some, found = ((p.predict(unseen) == truth).float().mean().item() for p in (unknown, whole))
    assert 0.6 < expected < 0.98
    assert found > expected - 0.02
    assert some == pytest.approx(found, abs=0.03)


def test_a_batch_without_a_class_changes_no_weight() -> None:
    probe = OnlineProbe(torch.full((4,), -1), ("a", "b"), 3)
    probe.learn(torch.randn(4, 3), np.arange(4))
    assert not probe.weight.any()
    assert probe.loss.isnan()


def test_statistics_are_those_of_all_rows_and_of_late_ones_later() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6400, 5, generator=generator) * 3 + 100
    probe = OnlineProbe(torch.zeros(64, dtype=torch.long), ("a",), 5)
    for batch in features.split(64):
        probe.learn(batch, np.arange(64))
    torch.testing.assert_close(probe.mean, features.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe.variance, features.var(0, correction=0), rtol=1e-4, atol=0)
    for batch in features.split(64) * 6:
        probe.learn(-batch, np.arange(64))
    torch.testing.assert_close(probe.mean, -features.mean(0), rtol=0.01, atol=0)


# Several processes


def learn_own_rows(num_steps: int) -> dict[str, Tensor]:
    features, labels = blobs()
    probe = OnlineProbe(labels, ("a", "b", "c"), features.shape[1])
    for step in range(num_steps):
        rows = np.arange(64 * step, 64 * (step + 1)).reshape(world_size(), -1)[rank()]
        probe.learn(features[rows], rows)
    return {**probe.state_dict(), "loss": probe.loss}


def test_processes_hold_the_same_probe_which_is_that_of_one(gloo: GlooPool) -> None:
    one = learn_own_rows(8)
    two = gloo.run(2, learn_own_rows, 8)
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=1e-4, atol=1e-6)


# Sessions


def test_it_is_switched_on_and_off_between_sessions(
    images: Path, otherwise: Path, whole_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = shutil.copytree(whole_run, tmp_path / "run")
    checkpoints = run / "checkpoints"
    sessions: list[tuple[Path, str, str | None]] = [
        (images, "false", None),
        (images, "true", f"{checkpoints / 'step-9'} holds none."),
        (otherwise, "true", f"that of {checkpoints / 'step-10'} is of other labels."),
    ]
    for step, (data, probe, anew) in enumerate(sessions, 9):
        train(data, run, *WHOLE, f"--max_steps={step}", f"--online_probe={probe}")
        printed = capsys.readouterr().out
        assert "online_probe was" not in printed
        assert ("The online probe starts anew" in printed) == (anew is not None)
        assert anew is None or f"The online probe starts anew: {anew}" in printed
        saved = checkpoints / f"step-{step}" / "probe.safetensors"
        assert saved.exists() == (probe == "true")
        if data == otherwise:
            assert load_file(saved)["steps"] == 1


# Requirements


def test_labels_and_a_held_out_split_are_needed(images: Path, tmp_path: Path) -> None:
    without = relabelled(images, tmp_path / "without", None, "train", "test")
    alone = relabelled(images, tmp_path / "alone", [0, 1] * 32, "train")
    few = write_images(tmp_path / "few", rows=18)
    cases: list[tuple[Path, list[str], str]] = [
        (without, [], "without (train) has no labels; if it has classes, name their column"),
        (alone, [], "there is no labelled split beside the one trained on"),
        (few, [], "few (train) has 18 labelled images, fewer than the 20 of the kNN monitor"),
        (images, ["--streaming=true"], "streams have neither; use --streaming false"),
    ]
    for folder, flags, words in cases:
        with pytest.raises(ValueError, match="online_probe needs labels and a held-out") as caught:
            train(folder, tmp_path / "run", *WHOLE, *flags)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
