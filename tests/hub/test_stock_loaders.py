"""One repository that every loader takes; transformers and timm themselves are the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from families import FAMILIES, FIXED_SIZES, config, photograph, pixels, same_state, trained
from hub import READER, Hub, connected, online, running_hub
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperModel,
    pipeline,
)
from workflow import LIMIT, environment

from vicreg_hf import VICRegModel

LOAD = """
import sys
sys.modules["vicreg_hf"] = None  # importing it fails
import timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, pipeline
root = sys.argv[1]
x = load_file(f"{root}/x.safetensors")["x"]
results = {}
with torch.no_grad():
    for revision in ("main", "v1"):
        assert AutoConfig.from_pretrained("org/a", revision=revision).model_type == "timm_wrapper"
        model = AutoModel.from_pretrained("org/a", revision=revision)
        encoder = timm.create_model(f"hf-hub:org/a@{revision}", pretrained=True).eval()
        results[f"transformers {revision}"] = model(x).pooler_output
        results[f"timm {revision}"] = encoder(x).contiguous()
pipe = pipeline(model="org/a", device="cpu")
assert pipe.task == "image-feature-extraction"
assert len(pipe(Image.open(f"{root}/photograph.png"), pool=True)[0]) == encoder.num_features
save_file(results, f"{root}/results.safetensors")
for load in (AutoModel.from_pretrained, lambda d: timm.create_model(f"local-dir:{d}")):
    try:
        load(f"{root}/ours")
    except Exception as error:
        assert "needs_import_vicreg_hf" in str(error), error
    else:
        raise AssertionError("an architecture of vicreg_hf loads without it")
"""
"""Loads encoders where vicreg_hf cannot be imported."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub to which an encoder was pushed, to a branch without its expander."""
    with running_hub() as hub, connected(hub, tmp_path_factory.mktemp("home")):
        trained().push_to_hub("org/a", private=True, include_expander=True)
        trained().push_to_hub("org/a", revision="v1")
        yield hub


def test_what_was_pushed_loads_where_vicreg_hf_is_not_installed(hub: Hub, tmp_path: Path) -> None:
    photograph().save(tmp_path / "photograph.png")
    save_file({"x": pixels()}, tmp_path / "x.safetensors")
    VICRegModel(config("resnet18_cifar")).save_pretrained(tmp_path / "ours", include_expander=False)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=False,
        env=environment(**online(hub, tmp_path / "reader", READER)), timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results.safetensors")
    assert len(results) == 4
    with torch.no_grad():
        expected = trained()(pixels()).pooler_output
    for features in results.values():
        torch.testing.assert_close(features, expected)


def test_a_push_is_one_commit_on_the_branch_that_was_named(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["models/org/a"]
    assert repository.private
    assert len(repository.commits) == 3  # empty, main, v1
    encoder = {"config.json", "model.safetensors", "README.md"}
    assert set(repository.files("v1")) == encoder
    training = {"expander.safetensors", "vicreg.safetensors.index.json"}
    assert set(repository.files()) == encoder | training
    expected = trained()  # which is restored to the last bit
    whole = VICRegModel.from_pretrained("org/a", cache_dir=tmp_path)
    assert same_state(whole, expected)
    bare = VICRegModel.from_pretrained("org/a", revision="v1", cache_dir=tmp_path)
    assert same_state(bare.encoder, expected.encoder)
    assert not same_state(bare.expander, expected.expander)


@torch.no_grad()
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_stock_loader_gives_our_features(architecture: str, tmp_path: Path) -> None:
    ours, x = trained(architecture), pixels(architecture)
    ours.save_pretrained(tmp_path)
    model: Any = AutoModel.from_pretrained(tmp_path)
    assert type(model) is TimmWrapperModel
    assert not model.training
    output, expected = model(x), ours(x)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)
    encoder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(encoder(x), expected.pooler_output)
    assert encoder.num_classes == 0
    if architecture in FIXED_SIZES:  # the backbone takes no other
        side = FIXED_SIZES[architecture]
        assert resolve_model_data_config(encoder)["input_size"] == (3, side, side)
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path)
    processed = processor(photograph())["pixel_values"]
    parts: Any = {"model": model, "image_processor": processor}
    pipe: Any = pipeline("image-feature-extraction", **parts, device="cpu")
    pooled = torch.tensor(pipe(photograph(), pool=True))
    torch.testing.assert_close(pooled, ours(processed).pooler_output)
    # the image processor has the size and the statistics of the configuration
    cfg = ours.config.pretrained_cfg
    assert cfg is not None
    assert list(processed.shape[1:]) == list(cfg["input_size"])
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    levels = (processed[0] * std + mean) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert 0 <= round(float(levels.min())) <= round(float(levels.max())) <= 255


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_classifiers_and_maps_start_from_the_encoder(architecture: str, tmp_path: Path) -> None:
    ours, x = trained(architecture), pixels(architecture)
    ours.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=10)
    logits = classifier(x, labels=torch.tensor([0, 1]))
    logits.loss.backward()
    assert logits.logits.shape == (2, 10)
    headed: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
    last = {"features_only": True, "out_indices": (-1,)}
    maps = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **last).eval()
    with torch.no_grad():
        assert headed(x).shape == (2, 7)
        head_input = headed.forward_head(headed.forward_features(x), pre_logits=True)
        torch.testing.assert_close(head_input, ours(x).pooler_output)
        assert maps(x)[-1].shape[0] == 2


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


def test_torchvisions_resnet_takes_the_weights(tmp_path: Path) -> None:
    model = trained("resnet18")
    model.save_pretrained(tmp_path, include_expander=False)
    bare: Any = torchvision.models.resnet18(weights=None).eval()
    keys = bare.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    bare.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(bare(pixels()), model(pixels()).pooler_output)


MAPS = """
import sys
sys.modules["vicreg_hf"] = None
import timm, torch
from safetensors.torch import load_file, save_file
from transformers import TimmBackbone
root, *names = sys.argv[1:]
x, maps = load_file(f"{root}/x.safetensors")["x"], {}
with torch.no_grad():
    for name in names:
        place = f"local-dir:{root}/{name}"
        pyramid = timm.create_model(place, pretrained=True, features_only=True).eval()
        maps[f"{name} timm"] = pyramid(x)[-1]
        backbone = TimmBackbone.from_pretrained(place).eval()
        weights = load_file(f"{root}/{name}/model.safetensors")
        backbone._backbone.load_state_dict(weights, strict=False)
        maps[f"{name} transformers"] = backbone(x).feature_maps[-1]
save_file({name: each.contiguous() for name, each in maps.items()}, f"{root}/maps.safetensors")
"""


def test_feature_maps_are_those_of_the_model_where_vicreg_hf_is_not_installed(
    tmp_path: Path,
) -> None:
    names, expected = ("test_resnet", "test_convnext"), {}
    save_file({"x": pixels()}, tmp_path / "x.safetensors")
    for name in names:
        model = trained(name)
        model.save_pretrained(tmp_path / name, include_expander=False)
        with torch.no_grad():
            expected[name] = model(pixels()).last_hidden_state
    done = subprocess.run(
        [sys.executable, "-c", MAPS, str(tmp_path), *names], capture_output=True, text=True,
        check=False, env=environment(), timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, found in load_file(tmp_path / "maps.safetensors").items():
        torch.testing.assert_close(found, expected[name.split()[0]])
