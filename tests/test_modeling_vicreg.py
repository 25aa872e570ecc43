"""How a model is configured and built, and what it gives of one view and of two."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES, config, pixels, same_state, trained
from transformers import AutoConfig
from workflow import train

import vicreg_hf
from vicreg_hf import VICRegConfig, VICRegModel, vicreg_loss

WIDTHS = (
    "expander_dims must be positive widths, as [8192, 8192, 8192], or these joined by '-', as "
    "8192-8192-8192,"
)


# Fields of the configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sim_coeff": float("nan")}, "sim_coeff must be a finite number of at least 0, got nan."),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0."),
        ({"variance_reduction": "max"}, "variance_reduction must be mean or sum, got 'max'."),
        ({"weights": "tied"}, "weights must be shared or separate, got 'tied'."),
        ({"expander_dims": [8, 0]}, f"{WIDTHS} got [8, 0]."),
        ({"architecture": None}, "architecture must be the name of a timm model, got None."),
        ({"model_args": "{}"}, "model_args must map names to values, as a dict, or be None, got '"),
        ({"value_range": [5, 1]}, "value_range must be two finite numbers joined by a comma, the "),
        ({"prime": "resnet18"}, "prime must map names to values, as a dict, or be None, got 'res"),
        ({"prime": {"model_args": 3}}, "prime's model_args must map names to values, as a dict,"),
        ({"prime": {"architecture": 3}}, "prime's architecture must be the name of a model, got 3"),
        ({"prime": {"expander_dims": 6}}, f"prime's {WIDTHS} got 6."),
        ({"prime": {"wings": 2}}, "prime must hold some of modality, architecture, "),
        ({"prime": {"modality": "smell"}}, "modality must be one of image, text, audio, embedding"),
        ({"prime": {"modality": "text"}}, "prime must hold encoder_config for the modality text"),
        ({"prime": {"expander_dims": [8, 4]}}, "both expanders must end in the same width"),
        ({"sim_coef": 8}, "sim_coef is no field of VICRegConfig; did you mean sim_coeff?"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        config(**settings)


def test_a_field_that_is_changed_while_loading_is_checked(tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    assert VICRegConfig.from_pretrained(tmp_path, std_coeff=3).std_coeff == 3
    with pytest.raises(ValueError, match=r"^std_coeff must be a finite number .*, got 'x'\."):
        VICRegConfig.from_pretrained(tmp_path, std_coeff="x")


@pytest.mark.parametrize("given", ["8-6", np.array([8, 6]), (8, 6), []])
def test_widths_of_the_expander_are_read(given: Any) -> None:
    expected = [8, 6] if len(given) else []
    assert list(config(expander_dims=given).expander_dims) == expected
    prime = config(prime={}, expander_dims=given).prime
    assert prime is not None
    assert prime["expander_dims"] == expected


def test_what_transformers_keeps_in_a_configuration_is_kept() -> None:
    given: dict[str, Any] = {
        "architectures": ["VICRegModel"], "dtype": "float32", "id2label": {0: "a", 1: "b"},
        "transformers_weights": "x.json", "num_features": 512, "use_cache": False,
    }  # fmt: skip
    found = AutoConfig.for_model("vicreg", **given)
    assert found.architectures == ["VICRegModel"]
    assert found.id2label == {0: "a", 1: "b"}
    assert (found.transformers_weights, found.num_features) == ("x.json", 512)
    assert VICRegConfig.from_dict(found.to_dict()).to_dict() == found.to_dict()


# Building


@pytest.mark.parametrize("architecture", FAMILIES)
def test_timms_own_initialisation_is_kept(architecture: str) -> None:
    torch.manual_seed(7)
    bare = timm.create_model(architecture, **{**(FAMILIES[architecture] or {}), "num_classes": 0})
    torch.manual_seed(7)
    assert same_state(VICRegModel(config(architecture)).encoder, bare)


def test_classes_and_pretrained_tags_are_left_out() -> None:
    model = VICRegModel(config(model_args={"num_classes": 10, "drop_path_rate": 0.1}))
    assert model(pixels()).pooler_output.shape == (2, model.num_features)
    assert model.config.model_args == {"drop_path_rate": 0.1}
    assert VICRegModel(config("test_resnet.r160_in1k")).config.architecture == "test_resnet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "got 'resnet51'; close to it are .*resnet50"),
        ("0123456789", r"timm\.list_models\(\) lists them"),
        ("resnet51.a1_in1k", r"'resnet51\.a1_in1k'; close to it are .*resnet50"),
        ("hf-hub:timm/resnet18.a1_in1k", r"bare name .*, such as resnet18\.a1_in1k, got .hf-hub:"),
        (
            "org/name",
            "bare name of a timm model, such as resnet18, got 'org/name'; --init_from org/name s",
        ),
        ("tests", "the bare name of a timm model, such as resnet18, got 'tests'"),
    ],
)
def test_an_unknown_architecture_is_refused_before_any_download(name: str, message: str) -> None:
    for build in (VICRegModel.from_timm, lambda name: VICRegModel(config(name))):
        with pytest.raises(ValueError, match=message):
            build(name)


def test_arguments_with_which_no_encoder_is_made_are_refused() -> None:
    with pytest.raises(ValueError, match="model_args must be arguments of timm's test_resnet"):
        VICRegModel(config(model_args={"nonsense": 1}))
    with pytest.raises(ValueError, match="must pool to shape"):
        VICRegModel(config(model_args={"global_pool": ""}))(pixels())


# Forward


def test_one_view_gives_timms_features_and_no_loss() -> None:
    model, x = trained(), pixels()
    output, features = model(x), model.encoder.forward_features(x)  # pyright: ignore
    assert set(output) == {"last_hidden_state", "pooler_output"}
    assert torch.equal(output.last_hidden_state, features)
    assert torch.equal(output.pooler_output, model.encoder(x))


def test_outputs_are_a_tuple_and_without_a_loss_where_that_is_said() -> None:
    model, x, x_prime = trained(), pixels(), pixels(seed=1)
    output = model(x, x_prime)
    loss, *_, features, y = model(x, x_prime, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(features, output.last_hidden_state)
    assert torch.equal(y, output.pooler_output)
    assert model(x, return_dict=True).loss is None
    assert model(x, x_prime, return_loss=False).keys() == model(x).keys()


@pytest.mark.parametrize("training", [True, False])
def test_two_views_give_what_the_parts_give_by_hand(training: bool) -> None:
    settings: dict[str, Any] = {
        "sim_coeff": 2.0, "std_coeff": 3.0, "cov_coeff": 5.0, "gamma": 1.5, "eps": 1e-3,
        "variance_reduction": "sum",
    }  # fmt: skip
    model = trained(**settings).train(training)
    parts = copy.deepcopy(model)
    x, x_prime = pixels(batch=4), pixels(batch=4, seed=1)
    output = model(x, x_prime)
    y, y_prime = parts.encoder(x), parts.encoder(x_prime)
    z, z_prime = parts.expander(y), parts.expander(y_prime)
    for name, value in vicreg_loss(z, z_prime, **settings)._asdict().items():
        assert torch.equal(output[name], value)
    assert torch.equal(output.embeddings[0], z)
    assert torch.equal(output.embeddings[1], z_prime)
    assert torch.equal(output.pooler_output, y)
    assert same_state(model, parts)  # running statistics as well


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_gradient_checkpointing_changes_no_gradient_and_counts_each_batch_once(
    architecture: str,
) -> None:
    plain = trained(architecture, weights="separate").train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable()
    for branch in saving.branches:
        assert branch.backbone.grad_checkpointing is True  # pyright: ignore
    for _ in range(2):
        for model in (plain, saving):
            x, x_prime = (pixels(architecture, batch=4, seed=seed) for seed in (0, 1))
            model(x, x_prime).loss.backward()
        for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert same_state(saving, plain)
        saving.activation_checkpointing_disable()


# From the training step to the loss


@pytest.mark.parametrize(
    ("flags", "between"),
    [([], []), (["--micro_batch_size=8"], ["backward_in_chunks"])],
    ids=["one pass", "chunks"],
)
def test_four_calls_lead_from_pretrain_to_vicreg_loss_and_one_more_for_chunks(
    flags: list[str], between: list[str], images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*_: Any) -> None:
        raise ValueError("the loss was called")

    monkeypatch.setattr("vicreg_hf.loss.vicreg.check_embeddings", refuse)
    with pytest.raises(ValueError, match="the loss was called") as caught:
        train(images, tmp_path, "--max_steps=2", *flags)
    package = Path(vicreg_hf.__file__).parent
    stack = [entry.name for entry in caught.traceback if Path(entry.path).is_relative_to(package)]
    assert stack == ["pretrain", "fit", "take_gradients", *between, "forward", "vicreg_loss"]
