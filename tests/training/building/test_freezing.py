"""Parts of encoders that stay as they are, with their running statistics."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.models.batch_norm import SyncBatchNorm
from vicreg_hf.training.building.freezing import freeze
from vicreg_hf.training.gradcache import backward_in_chunks


def build(*, separate: bool = False) -> VICRegModel:
    torch.manual_seed(0)
    weights = "separate" if separate else "shared"
    return VICRegModel(
        VICRegConfig(architecture="test_resnet", expander_dims=[8, 8], weights=weights)
    )


@pytest.mark.parametrize(
    ("patterns", "weights", "still"),
    [
        ("bn1", {"bn1.weight", "bn1.bias"}, {"bn1"}),
        ("bn1.bias", {"bn1.bias"}, set()),
        (" bn1.weight , bn1.bias", {"bn1.weight", "bn1.bias"}, {"bn1"}),
        ("layer[12].0.b*2.weight", {"layer1.0.bn2.weight", "layer2.0.bn2.weight"}, set()),
        ("prime.bn1", {"prime.bn1.weight", "prime.bn1.bias"}, {"prime.bn1"}),
    ],
)
def test_patterns_freeze_parameters_and_whole_normalisations(
    patterns: str, weights: set[str], still: set[str]
) -> None:
    model = build(separate=True)
    freeze(model, patterns)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.replace("backbone.", "") for name in frozen} == weights
    for again in (model, copy.deepcopy(model)):
        modes = {name.replace("backbone.", ""): m.training for name, m in
                 again.eval().train().named_modules()}  # fmt: skip
        assert {name for name, training in modes.items() if not training} == still
    model.encoder.train()  # as after a measurement
    assert not any(model.get_submodule(f"backbone.{n}").training for n in still - {"prime.bn1"})


# dynamo hides it itself, but not from those who make errors of warnings
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("how", "synchronised"),
    [
        *((how, kind) for how in ("one pass", "chunks", "checkpointing") for kind in (False, True)),
        ("compiled", False),
    ],
)
def test_frozen_statistics_and_weights_outlive_a_step(how: str, synchronised: bool) -> None:
    model = build()
    if synchronised:
        SyncBatchNorm.convert(model)
    freeze(model, "conv1,bn1,layer1")
    model.train()
    if how == "checkpointing":
        model.activation_checkpointing_enable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, x_prime = torch.randn(2, 4, 3, 32, 32)
    if how == "chunks":
        backward_in_chunks(model, x, x_prime, chunk_size=2)
    else:
        if how == "compiled":
            compiled = partial(torch.compile, backend="eager")
            model._call = lambda function, *inputs: compiled(function)(*inputs)
        model(x, x_prime).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.1).step()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    frozen = {name for name in before if name.split(".")[1] in {"conv1", "bn1", "layer1"}}
    assert frozen
    assert not changed & frozen
    assert {"backbone.layer2.0.bn1.running_mean", "backbone.layer2.0.bn2.weight"} <= changed


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("conv1,layr1", r"names? modules or .* got 'layr1'; near are layer1, .*\."),
        ("xyz", r"got 'xyz'; the encoder has conv1, bn1, layer1, layer2, layer3, layer4\.$"),
        ("conv1,", r"got ''; "),
        ("prime.conv1", r"got 'prime.conv1'; "),  # there is no second branch
        ("*", r"must leave a part of the encoder to train, got '\*'"),
        ("conv1,bn1,layer?", r"must leave a part of the encoder to train"),
    ],
)
def test_patterns_of_nothing_and_of_everything_are_refused(patterns: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(build(), patterns)
