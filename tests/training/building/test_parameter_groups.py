"""Groups of parameters by layer, against timm's own, and arguments of optimisers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
from timm.optim import param_groups_layer_decay
from torch import nn
from transformers import BertConfig, BertModel

from vicreg_hf import VICRegConfig, VICRegModel
from vicreg_hf.training.building.optimizers import create_optimizer
from vicreg_hf.training.building.parameter_groups import layer_groups


def shares(groups: Any, model: nn.Module) -> dict[str, tuple[float, float]]:
    """The share of the learning rate and the weight decay of every parameter in a group."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_either_branch_has_the_layers_of_timms_classifier_whose_place_the_expander_takes(
    name: str, optimizer: str
) -> None:
    config = VICRegConfig(architecture=name, expander_dims=[8, 8], weights="separate")
    model, classifier = VICRegModel(config), timm.create_model(name, num_classes=2)
    frozen = next(iter(model.backbone.state_dict()))
    model.get_parameter(f"backbone.{frozen}").requires_grad = False
    groups = create_optimizer(
        optimizer, model, lr=0.1, weight_decay=0.2, layer_decay=0.7
    ).param_groups
    own = shares(groups, model)
    expected = shares(
        param_groups_layer_decay(classifier, weight_decay=0.2, layer_decay=0.7), classifier
    )
    for branch in ("", "prime."):
        found = {key.removeprefix(f"{branch}backbone."): v for key, v in own.items()}
        body = {key: expected[key] for key, _ in model.backbone.named_parameters()}
        if not branch:
            assert body.pop(frozen)[0] == min(share for share, _ in expected.values())
        assert found.items() >= body.items()
        assert own[f"{branch}expander.0.weight"] == (1.0, 0.2)
        assert own[f"{branch}expander.1.bias"] == (1.0, 0.0)
    assert len(own) == sum(p.requires_grad for p in model.parameters())


def test_an_encoder_that_timm_does_not_know_has_a_layer_for_each_numbered_module() -> None:
    small: Any = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertModel(BertConfig(num_hidden_layers=2, vocab_size=9, **small))
    branch = SimpleNamespace(backbone=encoder, expander=nn.Linear(8, 4))
    model: Any = SimpleNamespace(branches=[branch])
    found = shares(layer_groups(model, layer_decay=0.5, weight_decay=0.0), encoder_and(branch))
    lowest, first, second = "embeddings.word_embeddings", "encoder.layer.0.output.dense", "pooler"
    assert [found[f"backbone.{lowest}.weight"][0], found[f"backbone.{first}.bias"][0]] == [
        0.125, 0.25]  # fmt: skip
    assert found[f"backbone.{second}.dense.weight"][0] == 0.5
    assert found["expander.weight"][0] == 1.0


def encoder_and(branch: Any) -> nn.Module:
    return nn.ModuleDict({"backbone": branch.backbone, "expander": branch.expander})


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("adamw", {"betas": [0.8, 0.9], "eps": 1e-6}, {"betas": (0.8, 0.9), "eps": 1e-6}),
        ("sgd", {"momentum": 0.5, "nesterov": False}, {"momentum": 0.5, "nesterov": False}),
        ("adan", {"betas": [0.9, 0.8, 0.7]}, {"betas": (0.9, 0.8, 0.7)}),
        ("lars", {"momentum": 0.5, "eta": 0.1, "clip": True}, {"eta": 0.1, "clip": True}),
    ],
)
def test_arguments_reach_the_optimiser_and_outlive_a_loaded_state(
    name: str, args: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = nn.Linear(3, 2)
    plain = create_optimizer(name, model, lr=0.1, weight_decay=0.1)
    optimizer = create_optimizer(name, model, lr=0.1, weight_decay=0.1, optimizer_args=args)
    optimizer.load_state_dict(plain.state_dict())
    assert all(group.items() >= expected.items() for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adamw", {"beta": 1}, r"must be arguments of adamw, got 'beta'; it has betas, eps, "),
        ("lars", {"betas": [1, 2]}, r"of lars, got 'betas'; it has momentum, eta, clip, foreach\."),
        ("adamw", {"lr": 1}, r"use --base_lr in place of lr\."),
        ("sgd", {"weight_decay": 1}, r"use --weight_decay in place of weight_decay\."),
        ("adamw", {"betas": [0.9]}, r"betas of optimizer_args must be a list of 2 numbers"),
        ("adamw", {"eps": "1e-8"}, r"eps of optimizer_args must be a number for adamw, got '1e-8'"),
        ("adamw", {"betas": [2, 0.9]}, r"that adamw takes, .* Invalid beta parameter at index 0"),
        ("lars", {"momentum": 2}, r"that lars takes, .*momentum must be at most 1, got 2"),
        ("lars", {"eta": 0.1}, r"lars_eta must be as in optimizer_args, got 0.2 and 0.1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_the_optimisers_own(
    name: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(
            name, nn.Linear(3, 2), lr=0.1, weight_decay=0.1, lars_eta=0.2, optimizer_args=args
        )
