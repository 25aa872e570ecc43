"""One repository that every loader takes; transformers and timm themselves are the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, FIXED_SIZES, photograph, pixels, same_state, trained
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from vicreg_hf import VICRegModel, VICRegOutput

# Stock loaders, where vicreg_hf cannot be imported

STOCK_LOADERS = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Absent(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "vicreg_hf":
            raise ImportError(fullname)

sys.meta_path.insert(0, Absent())
try:
    import vicreg_hf
except ImportError:
    pass
else:
    raise AssertionError("vicreg_hf must not be there")

import timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, pipeline

torch.set_num_threads(1)
root = Path(sys.argv[1])
for path in sorted(root.iterdir()):
    if not path.is_dir():
        continue
    photograph, x = Image.open(root / "photograph.png"), load_file(path / "input.safetensors")["x"]
    with torch.no_grad():
        model = AutoModel.from_pretrained(path)
        output = model(x)
        processed = AutoImageProcessor.from_pretrained(path)(photograph)["pixel_values"]
        pipe = pipeline("image-feature-extraction", model=str(path), device="cpu")
        encoder = timm.create_model(f"local-dir:{path}", pretrained=True)
        results = {
            "last_hidden_state": output.last_hidden_state,
            "pooler_output": output.pooler_output,
            "processed": processed,
            "pipeline": torch.tensor(pipe(photograph, pool=True)),
            "timm": encoder.eval()(x),
        }
    save_file({k: v.contiguous() for k, v in results.items()}, path / "results.safetensors")
    facts = {
        "type": f"{type(model).__module__}.{type(model).__name__}",
        "training": model.training,
        "num_classes": encoder.num_classes,
        "data": timm.data.resolve_model_data_config(encoder),
    }
    (path / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, with what the stock loaders made of it."""
    root = tmp_path_factory.mktemp("stock")
    photograph().save(root / "photograph.png")
    for architecture in FAMILIES:
        trained(architecture).save_pretrained(root / architecture)
        save_file({"x": pixels(architecture)}, root / architecture / "input.safetensors")
    command = [sys.executable, "-c", STOCK_LOADERS, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


@torch.no_grad()
def encode(architecture: str, x: Tensor) -> VICRegOutput:
    return trained(architecture)(x)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_auto_model_is_transformers_own_and_gives_our_features(
    stock: Path, architecture: str
) -> None:
    results, expected = load_file(stock / architecture / "results.safetensors"), encode(
        architecture, pixels(architecture)
    )  # fmt: skip
    found = facts(stock / architecture)["type"]
    assert found == "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel"
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(results[name], expected[name])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_auto_model_is_ready_for_use(stock: Path, architecture: str) -> None:
    assert facts(stock / architecture)["training"] is False


@pytest.mark.parametrize("architecture", FAMILIES)
def test_timm_gives_our_features(stock: Path, architecture: str) -> None:
    results = load_file(stock / architecture / "results.safetensors")
    expected = encode(architecture, pixels(architecture)).pooler_output
    torch.testing.assert_close(results["timm"], expected)
    assert facts(stock / architecture)["num_classes"] == 0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_pipeline_gives_our_features_of_the_processed_image(stock: Path, architecture: str) -> None:
    results = load_file(stock / architecture / "results.safetensors")
    expected = encode(architecture, results["processed"]).pooler_output
    torch.testing.assert_close(results["pipeline"], expected)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_image_processor_gives_the_size_and_statistics_of_the_config(
    stock: Path, architecture: str
) -> None:
    processed = load_file(stock / architecture / "results.safetensors")["processed"]
    cfg = trained(architecture).config.pretrained_cfg
    assert cfg is not None
    assert list(processed.shape[1:]) == cfg["input_size"]
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    levels = (processed[0] * std + mean) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.min() > -0.1
    assert levels.max() < 255.1


@pytest.mark.parametrize("architecture", FIXED_SIZES)
def test_timm_knows_the_size_of_a_backbone_that_takes_no_other(
    stock: Path, architecture: str
) -> None:
    side = FIXED_SIZES[architecture]
    assert facts(stock / architecture)["data"]["input_size"] == [3, side, side]


# The same repository as VICRegModel


@pytest.mark.parametrize("architecture", FAMILIES)
def test_from_pretrained_restores_backbone_and_expander_to_the_last_bit(
    stock: Path, architecture: str
) -> None:
    expected = trained(architecture)
    model = VICRegModel.from_pretrained(stock / architecture)
    assert type(model) is VICRegModel
    assert same_state(model, expected)
    assert not model.training


@pytest.mark.parametrize("architecture", FAMILIES)
def test_from_pretrained_gives_the_same_features(stock: Path, architecture: str) -> None:
    x = pixels(architecture)
    with torch.no_grad():  # buffers that are not saved count as well
        actual = VICRegModel.from_pretrained(stock / architecture)(x).pooler_output
    torch.testing.assert_close(actual, encode(architecture, x).pooler_output)


# What stock transformers has saved


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_goes_on_from_an_encoder_that_stock_transformers_has_saved(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    again = VICRegModel.from_pretrained(tmp_path / "stock", expander_dims=[5])
    assert same_state(again.encoder, model.encoder)
    assert again(pixels(), pixels(seed=1)).embeddings[0].shape == (2, 5)


def test_timm_loads_what_stock_transformers_has_saved(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'stock'}", pretrained=True)
    assert same_state(loaded, model.encoder)
