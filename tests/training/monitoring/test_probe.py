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
from warm import run_pretraining
from workflow import SMALL, metrics, write_images

from vicreg_hf import pretrain
from vicreg_hf.checkpoints.reading import newest_checkpoint
from vicreg_hf.runtime.distributed import rank, world_size
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.monitoring.probe import OnlineProbe

pytestmark = pytest.mark.usefixtures("one_core")

STEPS = 8
EVERY = [f"--max_steps={STEPS}", "--save_steps=3", "--knn_steps=3"]
"""An epoch has 4 steps: measured and saved at its end and in its midst."""
OWN = {"probe", "probe_loss", "views_per_second"}
"""Keys of a row that may differ: the probe's, and time."""


def train(images: Path, directory: Path, *flags: str, probe: bool = True) -> Path:
    own = [f"--dataset_name={images}", f"--output_dir={directory}", f"--online_probe={probe}"]
    pretrain(parse_arguments([*SMALL, *EVERY, *own, *flags]))
    return directory


def rows_of(directory: Path, without: set[str]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in without} for row in metrics(directory)]


def assert_same_bits(actual: Path, expected: Path) -> None:
    wanted = load_file(expected)
    tensors = load_file(actual)
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(tensors[name], value), name


def assert_same_training(directory: Path, expected: Path) -> None:
    for name in ("model", "optimizer"):
        file = Path("checkpoints", f"step-{STEPS}", f"{name}.safetensors")
        assert_same_bits(directory / file, expected / file)
    assert rows_of(directory, OWN) == rows_of(expected, OWN)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def probed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the probe."""
    return train(images, tmp_path_factory.mktemp("runs") / "probed")


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


VARIANTS = {
    "batch normalisation": [],
    "dropout and drop-path in micro-batches": [
        "--architecture=test_vit", "--micro_batch_size=8",
        '--model_args={"patch_size": 8, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_training_is_the_same_bit_for_bit_with_and_without(
    flags: list[str], images: Path, tmp_path: Path
) -> None:
    on = train(images, tmp_path / "on", *flags)
    off = train(images, tmp_path / "off", *flags, probe=False)
    assert_same_training(on, off)
    assert [row["step"] for row in metrics(on) if "probe" in row] == [3, 6, 8]
    assert [row["step"] for row in metrics(on) if "probe_loss" in row] == list(range(1, 9))
    assert not any(OWN & row.keys() - {"views_per_second"} for row in metrics(off))
    assert not (off / "checkpoints" / f"step-{STEPS}" / "probe.safetensors").exists()


def test_labels_change_the_probe_alone(images: Path, probed: Path, tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(2, size=64).tolist()
    other = train(relabelled(images, tmp_path / "other", labels), tmp_path / "run")
    file = Path("checkpoints", f"step-{STEPS}", "model.safetensors")
    assert_same_bits(other / file, probed / file)
    knn = {"knn", "knn_pixels", "knn_images"}
    assert rows_of(other, OWN | knn) == rows_of(probed, OWN | knn)
    losses = [[row.get("probe_loss") for row in metrics(run)[2:]] for run in (other, probed)]
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
    directory = train(images, tmp_path, "--max_steps=40", "--save_steps=40", "--knn_steps=40")
    rows = metrics(directory)
    assert "knn" in rows[0]
    assert "probe" not in rows[0]  # before it has learned anything
    assert rows[1]["probe_loss"] == pytest.approx(np.log(2))
    assert np.mean([row["probe_loss"] for row in rows[-8:]]) < 0.4
    assert rows[-1]["probe"] > 0.9
    shown = f"{100 * rows[-1]['probe']:.1f} %"
    assert f"online linear probe {shown:>7}" in capsys.readouterr().out
    card = (directory / "encoder" / "README.md").read_text()
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


def test_a_run_on_two_processes_has_the_probe_of_one(images: Path, tmp_path: Path) -> None:
    # Small steps, so that rounding stays small; each process holds rows of every micro-batch.
    flags = ["--optimizer=sgd", "--base_lr=0.01", "--micro_batch_size=8"]
    one = train(images, tmp_path / "1", *flags)
    result = run_pretraining(
        *SMALL, *EVERY, *flags, f"--dataset_name={images}", f"--output_dir={tmp_path / '2'}",
        "--online_probe=true", processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for alone, shared in zip(metrics(one), metrics(tmp_path / "2"), strict=True):
        for key in {"probe", "probe_loss"} & (alone.keys() | shared.keys()):
            assert shared[key] == pytest.approx(alone[key], rel=1e-3), alone["step"]


# Sessions


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["deleted", "truncated", "one bit flipped"])
def test_a_damaged_probe_is_named_and_the_checkpoint_before_taken(
    how: str, probed: Path, tmp_path: Path
) -> None:
    shutil.copytree(probed / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / f"step-{STEPS}" / "probe.safetensors", how)
    found, (sentence,) = newest_checkpoint(tmp_path / "checkpoints")
    assert found == tmp_path / "checkpoints" / "step-6"
    assert "probe.safetensors" in sentence


def test_a_run_that_goes_on_ends_with_the_same_probe(
    images: Path, probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(probed, directory)
    damage(directory / "checkpoints" / f"step-{STEPS}" / "probe.safetensors", "truncated")
    train(images, directory)
    # in the midst of an epoch
    assert f"Resuming from {directory / 'checkpoints' / 'step-6'}." in capsys.readouterr().out
    assert_same_training(directory, probed)
    assert rows_of(directory, {"views_per_second"}) == rows_of(probed, {"views_per_second"})
    file = Path("checkpoints", f"step-{STEPS}", "probe.safetensors")
    assert_same_bits(directory / file, probed / file)


def test_it_is_switched_on_and_off_between_sessions(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, anew = tmp_path / "run", "The online probe starts anew"

    def go_on(steps: int, images: Path = images, *, probe: bool) -> tuple[str, bool]:
        train(images, directory, f"--max_steps={steps}", "--warmup_epochs=0", probe=probe)
        printed = capsys.readouterr().out
        assert "online_probe was" not in printed
        saved = directory / "checkpoints" / f"step-{steps}" / "probe.safetensors"
        return printed, saved.exists()

    printed, saved = go_on(1, probe=False)
    assert (anew in printed, saved) == (False, False)
    printed, saved = go_on(2, probe=True)
    assert f"{anew}: {directory / 'checkpoints' / 'step-1'} holds none." in printed
    assert saved
    printed, saved = go_on(3, probe=True)
    assert (anew in printed, saved) == (False, True)
    labels = np.random.default_rng(1).integers(2, size=64).tolist()
    printed, _ = go_on(4, relabelled(images, tmp_path / "other", labels), probe=True)
    assert f"{anew}: that of {directory / 'checkpoints' / 'step-3'} is of other labels." in printed
    assert load_file(directory / "checkpoints" / "step-4" / "probe.safetensors")["steps"] == 1
    printed, saved = go_on(5, probe=False)
    assert (anew in printed, saved) == (False, False)


# What it needs


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
            train(folder, tmp_path / "run", *flags)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
