"""One repository that every loader takes; transformers and timm themselves are the reference.

Every kind of backbone is pushed to a private repository, and loaded by one process in which
vicreg_hf cannot be imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, FIXED_SIZES, config, photograph, pixels, same_state, trained
from hub import READER, Hub, connected, online, running_hub
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel
from workflow import LIMIT, environment

from vicreg_hf import VICRegModel

LOAD = """
import json, sys
from pathlib import Path
sys.modules["vicreg_hf"] = None  # importing it fails
import timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline,
)
torch.set_num_threads(1)
root = Path(sys.argv[1])
photograph = Image.open(root / "photograph.png")
for path in sorted(root.glob("*.safetensors")):
    repo, x = f"org/{path.stem}", load_file(path)["x"]
    assert AutoConfig.from_pretrained(repo).model_type == "timm_wrapper"
    model = AutoModel.from_pretrained(repo)
    encoder = timm.create_model(f"hf-hub:{repo}", pretrained=True)
    facts = {
        "type": f"{type(model).__module__}.{type(model).__name__}",
        "training": model.training,
        "num_classes": encoder.num_classes,
        "data": timm.data.resolve_model_data_config(encoder),
    }
    processor = AutoImageProcessor.from_pretrained(repo)
    processed = processor(photograph)["pixel_values"]
    parts = {"model": model, "image_processor": processor}
    pipe = pipeline("image-feature-extraction", **parts, device="cpu")
    with torch.no_grad():
        output = model(x)
        results = {
            "last_hidden_state": output.last_hidden_state,
            "transformers": output.pooler_output,
            "timm": encoder.eval()(x),
            "processed": processed,
            "pipeline": torch.tensor(pipe(photograph, pool=True)),
        }
    if path.stem in ("test_resnet", "test_vit", "test_convnext"):
        classifier = AutoModelForImageClassification.from_pretrained(repo, num_labels=10)
        logits = classifier(x, labels=torch.tensor([0, 1]))
        logits.loss.backward()
        headed = timm.create_model(f"hf-hub:{repo}", pretrained=True, num_classes=7).eval()
        last = {"features_only": True, "out_indices": (-1,)}
        maps = timm.create_model(f"hf-hub:{repo}", pretrained=True, **last).eval()
        with torch.no_grad():
            head_input = headed.forward_head(headed.forward_features(x), pre_logits=True)
            facts["shapes"] = [list(logits.logits.shape), list(headed(x).shape)]
            results |= {"headed": head_input, "map": maps(x)[-1]}
    save_file({k: v.contiguous() for k, v in results.items()}, root / f"{path.stem}.results")
    (root / f"{path.stem}.json").write_text(json.dumps(facts))
assert pipeline(model="org/test_resnet", device="cpu").task == "image-feature-extraction"
x = load_file(root / "test_resnet.safetensors")["x"]
with torch.no_grad():
    model = AutoModel.from_pretrained("org/test_resnet", revision="v1")
    results = {
        "transformers": model(x).pooler_output,
        "timm": timm.create_model("hf-hub:org/test_resnet@v1", pretrained=True).eval()(x),
    }
save_file(results, root / "v1.results")
for load in (AutoModel.from_pretrained, lambda d: timm.create_model(f"local-dir:{d}")):
    try:
        load(root / "ours")
    except Exception as error:
        assert "needs_import_vicreg_hf" in str(error), error
    else:
        raise AssertionError("an architecture of vicreg_hf loads without it")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub() as hub, connected(hub, tmp_path_factory.mktemp("home")):
        yield hub


@pytest.fixture(scope="module")
def stock(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of each family, and the stock loaders' results."""
    root = tmp_path_factory.mktemp("stock")
    photograph().save(root / "photograph.png")
    for architecture in FAMILIES:
        model = trained(architecture)
        model.push_to_hub(f"org/{architecture}", private=True, include_expander=True)
        save_file({"x": pixels(architecture)}, root / f"{architecture}.safetensors")
    trained().push_to_hub("org/test_resnet", revision="v1")
    VICRegModel(config("resnet18_cifar")).save_pretrained(root / "ours", include_expander=False)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(root)], capture_output=True, text=True, check=False,
        env=environment(**online(hub, root / "reader", READER)), timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root


@torch.no_grad()
def encode(architecture: str, x: Tensor) -> Any:
    return trained(architecture)(x)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_stock_loader_gives_our_features(stock: Path, architecture: str) -> None:
    results = load_file(stock / f"{architecture}.results")
    facts = json.loads((stock / f"{architecture}.json").read_text())
    expected = encode(architecture, pixels(architecture))
    torch.testing.assert_close(results["last_hidden_state"], expected.last_hidden_state)
    for loader in ("transformers", "timm"):
        torch.testing.assert_close(results[loader], expected.pooler_output)
    processed = encode(architecture, results["processed"]).pooler_output
    torch.testing.assert_close(results["pipeline"], processed)
    assert facts["type"].endswith("timm_wrapper.modeling_timm_wrapper.TimmWrapperModel")
    assert facts["training"] is False
    assert facts["num_classes"] == 0
    if architecture in FIXED_SIZES:  # the backbone takes no other
        side = FIXED_SIZES[architecture]
        assert facts["data"]["input_size"] == [3, side, side]
    # the image processor has the size and the statistics of the configuration
    cfg = trained(architecture).config.pretrained_cfg
    assert cfg is not None
    assert list(results["processed"].shape[1:]) == cfg["input_size"]
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    levels = (results["processed"][0] * std + mean) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert 0 <= round(float(levels.min())) <= round(float(levels.max())) <= 255


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_classifiers_and_feature_maps_start_from_the_encoder(
    stock: Path, architecture: str
) -> None:
    results = load_file(stock / f"{architecture}.results")
    facts = json.loads((stock / f"{architecture}.json").read_text())
    assert facts["shapes"] == [[2, 10], [2, 7]]
    expected = encode(architecture, pixels(architecture)).pooler_output
    torch.testing.assert_close(results["headed"], expected)
    assert results["map"].shape[0] == 2


def test_a_push_is_one_commit_on_the_branch_that_was_named(stock: Path, hub: Hub) -> None:
    expected = encode("test_resnet", pixels()).pooler_output
    for features in load_file(stock / "v1.results").values():
        torch.testing.assert_close(features, expected)
    repository = hub.repositories["models/org/test_resnet"]
    assert repository.private
    assert len(repository.commits) == 3  # empty, main, v1
    encoder = {"config.json", "model.safetensors", "README.md"}
    assert set(repository.files("v1")) == encoder
    training = {"expander.safetensors", "vicreg.safetensors.index.json"}
    assert set(repository.files()) == encoder | training


@pytest.mark.usefixtures("stock")
def test_vicreg_model_restores_what_was_pushed_to_the_last_bit(tmp_path: Path) -> None:
    expected = trained()
    whole = VICRegModel.from_pretrained("org/test_resnet", cache_dir=tmp_path)
    assert same_state(whole, expected)
    bare = VICRegModel.from_pretrained("org/test_resnet", revision="v1", cache_dir=tmp_path)
    assert same_state(bare.encoder, expected.encoder)
    assert not same_state(bare.expander, expected.expander)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_encoder_that_stock_transformers_has_saved_loads_again(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "ours")
    AutoModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    again = VICRegModel.from_pretrained(tmp_path / "stock", expander_dims=[5])
    assert same_state(again.encoder, model.encoder)
    assert again(pixels(), pixels(seed=1)).embeddings[0].shape == (2, 5)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'stock'}", pretrained=True)
    assert same_state(loaded, model.encoder)
