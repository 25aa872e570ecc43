"""A model whose branches are compiled: what it gives, and all that it leaves as it is."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from warm import run_pretraining
from workflow import SMALL, environment, metrics, write_images

from vicreg_hf import VICRegConfig, VICRegModel, pretrain
from vicreg_hf.arguments import parse_arguments
from vicreg_hf.compiling import Compiled
from vicreg_hf.gradcache import backward_in_chunks

pytestmark = [
    pytest.mark.usefixtures("one_core"),
    # dynamo hides it itself, but not from those who make errors of warnings
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
DROPPING = {"drop_rate": 0.3, "drop_path_rate": 0.3}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def twins(**settings: Any) -> tuple[VICRegModel, VICRegModel]:
    """The same model plainly and compiled, in the layout of training."""
    torch.manual_seed(0)
    config = VICRegConfig(architecture="test_resnet", expander_dims=[16, 16], **settings)
    plain = VICRegModel(config).train()
    plain.to(memory_format=torch.channels_last)  # pyright: ignore
    fused = copy.deepcopy(plain)
    fused.compile_branches()
    return plain, fused


def views(count: int, *, side: int = 32) -> list[Tensor]:
    pixels = torch.randn(count, 8, 3, side, side, generator=torch.Generator().manual_seed(side))
    return [view.to(memory_format=torch.channels_last) for view in pixels]


def assert_same_step(plain: VICRegModel, fused: VICRegModel) -> None:
    """Gradients and running statistics, to rounding, and in the weights' layout."""
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
        assert q.grad.stride() == p.grad.stride() == p.stride(), name
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("settings", "num_local"),
    [({}, 1), ({"model_args": DROPPING}, 0), ({"weights": "separate"}, 0)],
    ids=["local views", "dropout", "two branches"],
)
def test_loss_and_gradients_are_the_plain_ones(settings: Any, num_local: int) -> None:
    plain, fused = twins(**settings)
    losses = []
    for model in (plain, fused):
        torch.manual_seed(1)
        output = model(*views(2), local_views=views(num_local, side=16))
        assert output.loss is not None
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_step(plain, fused)


def test_chunks_drop_the_same_features_both_times() -> None:
    plain, fused = twins(model_args=DROPPING)
    losses = []
    for model in (plain, fused):
        torch.manual_seed(1)
        output = backward_in_chunks(model, *views(2), chunk_size=4)
        assert output.loss is not None
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_step(plain, fused)


def test_copies_and_pickles_are_of_themselves(tmp_path: Path) -> None:
    plain, fused = twins()
    x = views(2)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused(*x)
    plain(*x)
    copied, file = copy.deepcopy(fused), io.BytesIO()
    pickle.dump(fused, file)
    pickled = pickle.loads(file.getvalue())
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    expected, features = plain(*x).loss, plain.eval().encoder(x[0])
    for model in (copied, pickled):
        torch.testing.assert_close(model(*x).loss, expected)
        torch.testing.assert_close(model.eval().encoder(x[0]), features)
    copied.save_pretrained(tmp_path)
    loaded = VICRegModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.encoder(x[0]), features)


def test_errors_of_the_function_itself_are_raised() -> None:
    def refuse(x: Tensor) -> Tensor:
        return x @ x.new_zeros(7, 7)

    compiled = Compiled()
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="without torch.compile"):
        compiled(refuse, torch.zeros(3, 4))


# Runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def flags_of(images: Path, output_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"--dataset_name={images}", "--optimizer=sgd", "--base_lr=1e-2",
            "--max_steps=4", f"--output_dir={output_dir}", *more]  # fmt: skip


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in metrics(directory) if "loss" in row]


def test_a_compiled_run_goes_as_a_plain_one_and_either_resumes_the_other(
    images: Path, tmp_path: Path
) -> None:
    expected: list[float] = []
    for name, first, then in (("plain", "false", "true"), ("compiled", "true", "false")):
        flags = flags_of(images, tmp_path / name, "--save_steps=2")
        encoder = pretrain(parse_arguments([*flags, f"--compile_model={first}"]))
        assert (encoder / "model.safetensors").exists()
        assert "knn" in metrics(tmp_path / name)[-1]
        expected = expected or losses(tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-4")
        pretrain(parse_arguments([*flags, f"--compile_model={then}"]))
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-4)


def test_a_compiled_run_of_two_processes_goes_as_a_plain_one(images: Path, tmp_path: Path) -> None:
    # in a ResNet each synchronised normalisation ends a graph: the same, in minutes
    small = ["--architecture=test_vit", "--image_size=32"]
    pretrain(parse_arguments(flags_of(images, tmp_path / "plain", *small)))
    flags = flags_of(images, tmp_path / "two", *small, "--compile_model=true")
    result = run_pretraining(*flags, processes=2)
    assert result.returncode == 0, result.stderr
    assert "without torch.compile" not in result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_without_a_compiler_a_run_says_so_once_and_goes_on(images: Path, tmp_path: Path) -> None:
    pretrain(parse_arguments(flags_of(images, tmp_path / "plain")))
    nowhere = environment(
        CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
    )
    command = [sys.executable, "scripts/pretrain.py",
               *flags_of(images, tmp_path / "run", "--compile_model=true")]  # fmt: skip
    result = subprocess.run(command, env=nowhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("the model is trained without torch.compile") == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
