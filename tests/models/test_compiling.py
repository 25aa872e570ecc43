"""A model whose branches are compiled: what it computes, and all that it leaves as it is.

Compiling to machine code takes seconds for every graph. So one test does it for a small module, and
the others trace and differentiate the same graphs but run them as they are (aot_eager), which
`pytest -m slow` compiles too.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from warm import run_pretraining
from workflow import SMALL, metrics, write_images

from vicreg_hf import PretrainingArguments, VICRegConfig, VICRegModel, pretrain
from vicreg_hf.models import compiling
from vicreg_hf.models.compiling import Compiled, call_directly, compiler_fault
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training import setup as preparation
from vicreg_hf.training.gradcache import backward_in_chunks
from vicreg_hf.training.setup import WORTH_COMPILING

pytestmark = [
    pytest.mark.usefixtures("one_core"),
    # dynamo hides it itself, but not from those who make errors of warnings
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
DROPPING = {"drop_rate": 0.3, "drop_path_rate": 0.3}
default_cfgs = generate_default_cfgs(
    {"two_stages": {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}}
)


@register_model
def two_stages(pretrained: bool = False, **kwargs: Any) -> ByobNet:
    """Two residual blocks, compiled in half the time that timm's smallest ResNet takes."""
    stage = ByoBlockCfg(type="basic", d=1, c=8, s=2)
    layers = ByoModelCfg(blocks=(stage, stage), stem_chs=8, stem_type="3x3", stem_pool="")
    return build_model_with_cfg(ByobNet, "two_stages", pretrained, model_cfg=layers, **kwargs)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "aot_eager":
        traced = partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(compiling.torch, "compile", lambda f, **_: traced(f, dynamic=False))


def twins(**settings: Any) -> tuple[VICRegModel, VICRegModel]:
    """The same model compiled and not, in the layout of training, in double precision."""
    torch.manual_seed(0)
    config = VICRegConfig(architecture="two_stages", expander_dims=[16, 16], **settings)
    plain = VICRegModel(config).double().train()
    plain.to(memory_format=torch.channels_last)  # pyright: ignore
    fused = copy.deepcopy(plain)
    fused.compile_branches()
    return plain, fused


def views(count: int, *, side: int = 32) -> list[Tensor]:
    pixels = torch.randn(count, 8, 3, side, side, generator=torch.Generator().manual_seed(side))
    return [view.double().to(memory_format=torch.channels_last) for view in pixels]


def assert_same_step(
    plain: VICRegModel, fused: VICRegModel, *, chunk_size: int | None = None, **settings: Any
) -> None:
    """Compare losses, gradients and running statistics, and that the weights' layout is kept."""
    losses = []
    for model in (plain, fused):
        torch.manual_seed(1)
        if chunk_size:
            output: Any = backward_in_chunks(model, *views(2), chunk_size=chunk_size)
        else:
            output = model(*views(2), **settings)
            output.loss.backward()
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)
        assert q.grad.stride() == p.grad.stride() == p.stride(), name  # pyright: ignore
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


def apply(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def test_machine_code_computes_drops_and_counts_as_a_plain_module() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)).double()
    fused, x = copy.deepcopy(plain), torch.randn(8, 6, dtype=torch.float64)
    outputs = []
    for call, module in ((call_directly, plain), (Compiled(), fused)):
        torch.manual_seed(1)
        outputs.append(call(apply, module, x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"weights": "separate"}, {"local_views": views(1, side=16)}),
        ({}, {"chunk_size": 4}),
        (
            {"local_weight": 0.25, "local_expander_dims": [8, 8]},
            {"places": torch.tensor([[0.0, 5, 20, 20, 0], [3, 0, 16, 24, 1]]).repeat(8, 1, 1)},
        ),
    ],
)
def test_a_compiled_step_is_the_plain_one(config: dict[str, Any], settings: dict[str, Any]) -> None:
    assert_same_step(*twins(**config, model_args=DROPPING), **settings)


@pytest.mark.usefixtures("backend")
def test_copies_and_pickles_have_weights_of_their_own() -> None:
    plain, fused = twins()
    x = views(2)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused(*x)
    plain(*x)
    copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    expected, features = plain(*x).loss, plain.eval().encoder(x[0])
    for model in copies:
        torch.testing.assert_close(model(*x).loss, expected)
        torch.testing.assert_close(model.eval().encoder(x[0]), features)


def test_errors_of_the_function_itself_are_raised() -> None:
    with pytest.raises(RuntimeError):
        Compiled()(lambda x: x @ x.new_zeros(7, 7), torch.zeros(3, 4))


@pytest.mark.parametrize("fails", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_part_that_cannot_be_compiled_is_run_as_it_is_and_once(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, compiled = compile_fx.fx_codegen_and_compile, set()

    def fail(*args: Any, **kwargs: Any) -> Any:
        compiled.add("backward" if kwargs.get("is_backward") else "forward")
        if fails in compiled:
            raise RuntimeError("no such instruction")
        return make(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", fail)
    norm, x = nn.BatchNorm1d(4), torch.randn(8, 4, requires_grad=True)
    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        y = Compiled()(apply, norm, x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert fails in compiled
    assert norm.num_batches_tracked == 1
    again = norm(x)
    torch.testing.assert_close(y, again)
    torch.testing.assert_close(grad, torch.autograd.grad(again.square().sum(), x)[0])


def test_by_default_long_runs_on_gpus_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "compiler_fault", lambda _: None)
    monkeypatch.setattr(preparation, "any_process", lambda flags, _: flags)
    for device, processes, left, expected in (
        ("cuda", 1, WORTH_COMPILING, True),
        ("cuda", 1, WORTH_COMPILING - 1, False),
        ("cuda", 2, WORTH_COMPILING, True),
        ("cpu", 1, WORTH_COMPILING, False),
    ):
        accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=processes)
        for asked, compiled in ((None, expected), (not expected, not expected)):
            args = PretrainingArguments(compile_model=asked)
            assert preparation._compiles_model(args, accelerator, left) is compiled


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in metrics(directory) if "loss" in row]


def run(images: Path, output_dir: Path, *more: str) -> list[float]:
    """Train for four steps, or go on; the losses of all."""
    flags = [*SMALL, f"--dataset_name={images}", "--optimizer=sgd", "--base_lr=1e-2",
             "--architecture=two_stages", "--save_steps=2", "--max_steps=4",
             f"--output_dir={output_dir}", *more]  # fmt: skip
    encoder = pretrain(parse_arguments(flags))
    assert (encoder / "model.safetensors").exists()
    assert "knn" in metrics(output_dir)[-1]
    return losses(output_dir)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", rows=32)


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is not compiled."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    run(images, folder, "--compile_model=false")
    return folder


@pytest.mark.usefixtures("backend")
def test_a_compiled_run_begins_as_a_plain_one_and_resumes_it(
    images: Path, plain: Path, tmp_path: Path
) -> None:
    """In float32 only one step is compared: by the next a rounding may have set a ReLU."""
    expected = losses(plain)
    found = run(images, tmp_path / "compiled", "--compile_model=true")
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    resumed = shutil.copytree(plain, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step-4")
    found = run(images, resumed, "--compile_model=true")
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    assert len(found) == 4


@pytest.mark.slow
def test_a_compiled_run_of_two_processes_begins_as_a_plain_one(
    images: Path, tmp_path: Path
) -> None:
    # whose expander normalises over both; to compile a ResNet takes a minute
    flags = [*SMALL, f"--dataset_name={images}", "--architecture=test_vit", "--image_size=32",
             "--max_steps=2"]  # fmt: skip
    pretrain(parse_arguments([*flags, f"--output_dir={tmp_path / 'plain'}"]))
    more = f"--output_dir={tmp_path / 'two'}", "--compile_model=true"
    result = run_pretraining(*flags, *more, processes=2)
    assert result.returncode == 0, result.stderr
    assert "without torch.compile" not in result.stderr
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=1e-5)


def test_without_a_compiler_a_run_says_so_once_and_goes_on(
    images: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor_config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        assert "no-compiler" in str(compiler_fault(torch.device("cpu")))
        with pytest.warns(UserWarning, match="is trained without torch.compile") as said:
            found = run(images, tmp_path / "run", "--compile_model=true")
    assert sum("without torch.compile" in str(warning.message) for warning in said) == 1
    assert found == losses(plain)
