"""The online probe: it measures the encoder, and the encoder is as if it were not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from gloo import GlooPool
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from workflow import WHOLE, assert_same_file, metrics, train, without, write_images

from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.training.monitoring.probe import OnlineProbe

pytestmark = pytest.mark.usefixtures("one_core")

OWN = {"probe", "probe_loss"}
"""Keys of a row that the probe adds."""


def assert_same_training(directory: Path, expected: Path, *keys: str) -> None:
    """Weights, optimiser state and metrics but the probe's and some others are the same."""
    for name in ("model", "optimizer"):
        file = Path("checkpoints", "step-8", f"{name}.safetensors")
        assert_same_file(directory / file, expected / file)
    assert without({*OWN, *keys}, directory) == without({*OWN, *keys}, expected)


def relabelled(images: Path, folder: Path, labels: list[int] | None, *splits: str) -> Path:
    """The same images in some splits, and other labels for those trained on, or none."""
    folder.mkdir()
    for split in splits or ("train", "test"):
        table = datasets.Dataset.from_parquet(str(images / f"{split}.parquet"))
        assert isinstance(table, datasets.Dataset)
        if split == "train" or labels is None:
            kind, table = table.features["kind"], table.remove_columns("kind")
            if labels is not None:
                table = table.add_column("kind", labels).cast_column("kind", kind)  # pyright: ignore
        table.to_parquet(folder / f"{split}.parquet")
    return folder


# Nothing of it reaches the encoder


def test_training_is_the_same_bit_for_bit_with_and_without(
    images: Path, whole_run: Path, tmp_path: Path
) -> None:
    train(images, tmp_path, *WHOLE, "--online_probe=false")
    assert_same_training(tmp_path, whole_run)
    rows = metrics(whole_run)
    assert [row["step"] for row in rows if "probe" in row] == [3, 6, 8]  # none before it learns
    assert [row["step"] for row in rows if "probe_loss" in row] == list(range(1, 9))
    assert not any(OWN & row.keys() for row in metrics(tmp_path))
    assert not (tmp_path / "checkpoints" / "step-8" / "probe.safetensors").exists()


def test_so_it_is_with_dropout_in_micro_batches(images: Path, tmp_path: Path) -> None:
    drop = '--model_args={"patch_size": 8, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}'
    flags = [*WHOLE, "--architecture=test_vit", "--micro_batch_size=8", drop]
    for probe in ("true", "false"):
        train(images, tmp_path / probe, *flags, f"--online_probe={probe}")
    assert_same_training(tmp_path / "true", tmp_path / "false")


def test_labels_change_the_probe_alone(images: Path, whole_run: Path, tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(2, size=64).tolist()
    run = tmp_path / "run"
    train(relabelled(images, tmp_path / "other", labels), run, *WHOLE)
    assert_same_training(run, whole_run, "knn", "knn_pixels", "knn_images")
    losses = [[row.get("probe_loss") for row in metrics(r)[2:]] for r in (run, whole_run)]
    assert losses[0] != losses[1]


def test_a_step_touches_neither_the_graph_nor_random_numbers() -> None:
    features, labels = blobs()
    probe = OnlineProbe(labels, ("a", "b", "c"), features.shape[1])
    leaf = features[:16].clone().requires_grad_()
    y = leaf * 2
    before = torch.get_rng_state()
    probe.learn(y, np.arange(16))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(value.requires_grad for value in (*probe.buffers(), probe.loss))
    y.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2))


# It learns


def test_it_tells_dark_from_light(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = ["--max_steps=40", "--save_steps=40", "--knn_steps=40"]
    rows = train(images, tmp_path, *WHOLE, *length)
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


def test_it_comes_near_to_logistic_regression() -> None:
    features, labels = blobs()
    unseen, truth = blobs(seed=1)
    probe = OnlineProbe(labels, ("a", "b", "c"), features.shape[1])
    order = np.random.default_rng(2)
    for _ in range(400):
        rows = order.integers(len(labels), size=64)
        probe.learn(features[rows], rows)
    centred = (features - features.mean(0)) / features.std(0)
    best = LogisticRegression().fit(centred, labels)
    expected = best.score((unseen - features.mean(0)) / features.std(0), truth)
    assert 0.6 < expected < 0.98
    assert (probe.predict(unseen) == truth).float().mean().item() > expected - 0.02


def test_images_without_a_class_teach_nothing() -> None:
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
    accuracies = [(p.predict(unseen) == truth).float().mean().item() for p in (unknown, whole)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.03)


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


def test_a_damaged_probe_is_named_and_the_checkpoint_before_taken(
    whole_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    file = run / "checkpoints" / "step-8" / "probe.safetensors"
    content = file.read_bytes()
    for damaged in (None, content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        found, (sentence,) = newest_checkpoint(run / "checkpoints")
        assert found == run / "checkpoints" / "step-6"
        assert "probe.safetensors" in sentence


def test_it_is_switched_on_and_off_between_sessions(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.random.default_rng(1).integers(2, size=64).tolist()
    other = relabelled(images, tmp_path / "other", labels)
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    sessions: list[tuple[Path, str, str | None]] = [
        (images, "false", None),
        (images, "true", f"{checkpoints / 'step-1'} holds none."),
        (other, "true", f"that of {checkpoints / 'step-2'} is of other labels."),
        (images, "false", None),
    ]
    for step, (data, probe, anew) in enumerate(sessions, 1):
        flags = [f"--max_steps={step}", "--warmup_epochs=0", f"--online_probe={probe}"]
        train(data, run, *flags)
        printed = capsys.readouterr().out
        assert "online_probe was" not in printed
        assert ("The online probe starts anew" in printed) == (anew is not None)
        assert anew is None or f"The online probe starts anew: {anew}" in printed
        saved = checkpoints / f"step-{step}" / "probe.safetensors"
        assert saved.exists() == (probe == "true")
        if data == other:
            assert load_file(saved)["steps"] == 1


# Requirements


def test_labels_and_a_held_out_split_are_needed(images: Path, tmp_path: Path) -> None:
    without = relabelled(images, tmp_path / "without", None)
    alone = relabelled(images, tmp_path / "alone", list(range(2)) * 32, "train")
    few = write_images(tmp_path / "few", rows=18)
    unlabelled = relabelled(images, tmp_path / "unlabelled", None, "test")
    shutil.copy(images / "train.parquet", unlabelled)
    cases: list[tuple[Path, list[str], str]] = [
        (without, [], "without (train) has no labels; if it has classes, name their column"),
        (alone, [], "there is no labelled split beside the one trained on"),
        (unlabelled, ["--eval_split=test"], "unlabelled (test) has no labels"),
        (few, [], "few (train) has 18 labelled images, fewer than the 20 of the kNN monitor"),
        (images, ["--streaming=true"], "streams have neither; use --streaming false"),
    ]
    for folder, flags, words in cases:
        with pytest.raises(ValueError, match="online_probe needs labels and a held-out") as caught:
            train(folder, tmp_path / "run", *WHOLE, *flags)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
