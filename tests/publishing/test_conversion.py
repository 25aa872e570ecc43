"""Checkpoints of other code, against torchvision's networks, changed as that code describes."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hostile import Bomb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from vicreg_hf import VICRegConfig, VICRegModel, convert_checkpoint
from vicreg_hf.models.expander import expander


class Wide(ResNet):
    """The authors' networks of twice the width, of the stem and of every block."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__(Bottleneck, counts)
        self.conv1, self.bn1 = nn.Conv2d(3, 128, 7, 2, 3, bias=False), nn.BatchNorm2d(128)

    def _make_layer(self, block: Any, planes: int, *counts: Any, **given: Any) -> nn.Sequential:
        self.inplanes = 128 if planes == 64 else self.inplanes
        return super()._make_layer(block, 2 * planes, *counts, **given)


def authors(network: Any) -> Any:
    """A torchvision ResNet without its last layer, whose stem pads as that of the authors."""
    network.fc, network.conv1.padding = nn.Identity(), (2, 2)
    network.conv1.register_forward_pre_hook(lambda _, given: F.pad(given[0], (1, 1, 1, 1)))
    return network


WIDTHS = [24, 24, 16]


def shaken(module: nn.Module) -> Any:
    """Change statistics and affine parameters, so that they are not those of a new network."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.mul_(1 + torch.rand_like(tensor))
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(0.1 * torch.rand_like(tensor))
        elif not tensor.is_floating_point():
            tensor.fill_(7)
    return module.eval()


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def r18() -> Any:
    """A torchvision ResNet-18 without its last layer."""
    return authors(shaken(resnet18()))


@torch.no_grad()
def same_features(encoder: nn.Module, reference: nn.Module) -> None:
    torch.testing.assert_close(encoder.eval()(X), reference(X), rtol=1e-4, atol=1e-5)


def same_weights(directory: Path, reference: nn.Module) -> bool:
    """Whether a published encoder has the weights, under torchvision's names, which are timm's."""
    saved, expected = load_file(directory / "model.safetensors"), reference.state_dict()
    return saved.keys() == expected.keys() and all(
        torch.equal(saved[name], expected[name]) for name in saved
    )


def test_the_authors_full_checkpoint_keeps_its_expander(
    tmp_path: Path,
) -> None:
    r50, head = shaken(authors(resnet50())), shaken(expander(2048, WIDTHS))
    weights = prefixed("module.backbone.", r50) | prefixed("module.projector.", head)
    optimizer = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "model": weights, "optimizer": optimizer}, tmp_path / "model.pth")
    done = convert_checkpoint(tmp_path / "model.pth", tmp_path / "out")
    assert (done.architecture, done.has_expander, done.left_out) == ("resnet50", True, ())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "resnet50"
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    model = VICRegModel.from_pretrained(tmp_path / "out").eval()
    assert model.config.expander_dims == WIDTHS
    same_features(model.encoder, r50)
    with torch.no_grad():
        embedded = model(X, X).embeddings
        assert embedded is not None
        torch.testing.assert_close(embedded[0], head(r50(X)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_wide_network_is_found_and_loads_after_the_import(tmp_path: Path) -> None:
    wide = shaken(authors(Wide([3, 4, 6, 3])))
    torch.save(wide.state_dict(), tmp_path / "resnet50x2.pth")
    done = convert_checkpoint(tmp_path / "resnet50x2.pth", tmp_path / "out")
    assert done.architecture == "resnet50x2"
    same_features(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), wide)


@pytest.mark.parametrize(("name", "counts"), [("50", [3, 4, 6, 3]), ("200", [3, 24, 36, 3])])
def test_the_wide_networks_have_the_authors_weights(name: str, counts: list[int]) -> None:
    with torch.device("meta"):
        ours = timm.create_model(f"resnet{name}x2", num_classes=0)
        theirs = authors(Wide(counts))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


def test_a_checkpoint_of_lightly_is_read(r18: Any, tmp_path: Path) -> None:
    """The examples of lightly save an nn.Sequential of a ResNet's children."""
    backbone = nn.Sequential(*list(r18.children())[:-1])
    weights = prefixed("backbone.", backbone) | prefixed(
        "projection_head.layers.", expander(512, WIDTHS)
    )
    online = {f"online_classifier.linear.{k}": torch.zeros(3) for k in ("weight", "bias")}
    torch.save({"state_dict": weights | online, "loops": {}}, tmp_path / "last.ckpt")
    done = convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    assert done.architecture == "resnet18"
    assert done.left_out == ("online_classifier", "projection_head")
    assert same_weights(tmp_path / "out", r18)


def test_a_checkpoint_of_the_authors_evaluation_is_read(r18: Any, tmp_path: Path) -> None:
    parts = prefixed("module.0.", r18) | prefixed("module.1.", nn.Linear(512, 10))
    torch.save({"epoch": 3, "best_acc": None, "model": parts}, tmp_path / "checkpoint.pth")
    done = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "out")
    assert (done.has_expander, done.left_out) == (False, ("classifier",))
    assert not (tmp_path / "out" / "expander.safetensors").exists()
    assert same_weights(tmp_path / "out", r18)


def test_one_resnet_in_safetensors_is_read_whose_stem_tells_its_channels(tmp_path: Path) -> None:
    gray = timm.create_model("resnet18", in_chans=1, num_classes=0)
    parts = prefixed("", gray) | prefixed("fc.", nn.Linear(512, 10))
    save_file(parts, tmp_path / "gray.safetensors")
    done = convert_checkpoint(tmp_path / "gray.safetensors", tmp_path / "out")
    assert done.left_out == ("fc",)
    assert same_weights(tmp_path / "out", gray)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] == {"in_chans": 1}
    assert config["pretrained_cfg"]["input_size"] == [1, 224, 224]
    assert len(config["pretrained_cfg"]["mean"]) == 1


class DictConfig:
    """The settings that solo-learn keeps in its checkpoints, of a package that is not here."""

    def __init__(self) -> None:
        self.settings = OrderedDict(lr=0.3)


def test_a_checkpoint_of_solo_learn_is_read_without_its_settings(tmp_path: Path) -> None:
    reference: Any = shaken(resnet18())
    reference.fc = nn.Identity()
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = nn.Identity()
    weights = prefixed("backbone.", reference) | prefixed("classifier.", nn.Linear(512, 10))
    head = expander(512, WIDTHS)
    head[-1] = nn.Linear(24, 16)  # with a bias, which an expander has not
    weights |= prefixed("projector.", head)
    content = {"state_dict": weights, "hyper_parameters": DictConfig()}
    torch.save(content, tmp_path / "ep=999.ckpt")
    done = convert_checkpoint(tmp_path / "ep=999.ckpt", tmp_path / "out")
    assert done.architecture == "resnet18_cifar"
    assert done.left_out == ("classifier", "projector")
    assert "`import vicreg_hf` first" in (tmp_path / "out" / "README.md").read_text()
    same_features(VICRegModel.from_pretrained(tmp_path / "out").encoder, reference)


@pytest.mark.parametrize("kind", ["beside", "instead", "legacy"])
def test_nothing_in_a_checkpoint_is_executed(kind: str, tmp_path: Path) -> None:
    trap = Bomb(tmp_path / "executed")
    content = {"state_dict": {"conv1.weight": torch.zeros(3)}, "hyper_parameters": trap}
    if kind == "instead":
        content = {"state_dict": {"conv1.weight": trap}}
    path = tmp_path / "evil.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ValueError, match="checkpoint must"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def refusal(content: Any, folder: Path) -> str:
    """The sentence with which a checkpoint of this content is refused."""
    path = folder / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller compares the sentence
        convert_checkpoint(path, folder / "out")
    assert not (folder / "out").exists()
    return str(caught.value)


def test_every_weight_left_over_or_missing_is_listed(r18: Any, tmp_path: Path) -> None:
    state = dict(r18.state_dict())
    del state["layer2.1.bn2.running_mean"]
    state |= {"extra.weight": torch.zeros(3), "bn1.weight": torch.zeros(65)}
    sentence = refusal(state, tmp_path)
    assert "those of resnet18, and are not" in sentence
    assert 'Unexpected key(s) in state_dict: "extra.weight".' in sentence
    assert 'Missing key(s) in state_dict: "layer2.1.bn2.running_mean".' in sentence
    assert "size mismatch for bn1.weight" in sentence
    backbone = prefixed("module.backbone.", r18)
    others = backbone | {"module.decoder.weight": torch.zeros(3)}
    assert "got 1 of others: decoder.weight" in refusal({"model": others}, tmp_path)
    head = prefixed("module.projector.", expander(512, WIDTHS))
    for lost in ("0.bias", "6.weight"):
        part = {name: value for name, value in head.items() if not name.endswith(f"r.{lost}")}
        sentence = refusal({"model": backbone | part}, tmp_path)
        assert "those of an expander, and are not" in sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<html>404</html>", "holds weights and no code to run"),
        ({"epoch": 3}, "must hold weights by name"),
        ({"conv1.weight": torch.zeros(3), "epoch": 3}, "got 1 other values"),
        ({"blocks.0.weight": torch.zeros(3)}, "whose first weight is conv1.weight"),
    ],
)
def test_other_files_are_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    assert sentence in refusal(content, tmp_path)
    with pytest.raises(ValueError, match="must be a file"):
        convert_checkpoint(tmp_path / "absent.pth", tmp_path / "out")


def test_our_own_architectures_train_like_any_other() -> None:
    model = VICRegModel(VICRegConfig(architecture="resnet18_cifar", expander_dims=[8]))
    assert model.config.pretrained_cfg is not None
    assert model.config.pretrained_cfg["input_size"] == [3, 32, 32]
    model(X[:, :, :32, :32], X[:, :, 32:, 32:]).loss.backward()
    maps = timm.create_model("resnet18_cifar", features_only=True)(X)
    assert [tuple(m.shape[2:]) for m in maps] == [(64, 64), (64, 64), (32, 32), (16, 16), (8, 8)]
