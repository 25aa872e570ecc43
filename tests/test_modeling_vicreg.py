"""How a model is configured and built, and what it gives of one view and of two."""

from __future__ import annotations

import copy
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from families import FAMILIES, config, pixels, same_state, trained
from transformers import AutoConfig
from workflow import SMALL, write_images

from vicreg_hf import VICRegConfig, VICRegModel, pretrain, vicreg_loss
from vicreg_hf.settings.command_line import parse_arguments

WIDTHS = (
    "expander_dims must be positive widths, as [8192, 8192, 8192], or these joined by '-', as "
    "8192-8192-8192,"
)


# Fields of the configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sim_coeff": float("nan")}, "sim_coeff must be a finite number of at least 0, got nan."),
        ({"cov_coeff": "1"}, "cov_coeff must be a finite number of at least 0, got '1'."),
        ({"gamma": None}, "gamma must be a finite number of at least 0, got None."),
        ({"eps": float("inf")}, "eps must be a finite number above 0, got inf."),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0."),
        ({"variance_reduction": "max"}, "variance_reduction must be mean or sum, got 'max'."),
        ({"expander_dims": [8, 0]}, f"{WIDTHS} got [8, 0]."),
        ({"expander_dims": [8.5]}, f"{WIDTHS} got [8.5]."),
        ({"expander_dims": ["8"]}, f"{WIDTHS} got ['8']."),
        ({"expander_dims": 8}, f"{WIDTHS} got 8."),
        ({"expander_dims": "8,8"}, f"{WIDTHS} got '8,8'."),
        ({"architecture": None}, "architecture must be the name of a timm model, got None."),
        ({"model_args": "{}"}, "model_args must map names to values, as a dict, or be None,"),
        ({"pretrained_cfg": 3}, "pretrained_cfg must map names to values, as a dict, or be None,"),
        ({"spectrogram": 3}, "spectrogram must map names to values, as a dict, or be None, got 3."),
        ({"prime": "resnet18"}, "prime must map names to values, as a dict, or be None, got 'res"),
        ({"prime": {"model_args": 3}}, "prime's model_args must map names to values, as a dict,"),
        ({"prime": {"architecture": 3}}, "prime's architecture must be the name of a model, got 3"),
        ({"prime": {"expander_dims": 6}}, f"prime's {WIDTHS} got 6."),
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [("8-6", [8, 6]), ("8", [8]), (np.array([8, 6]), [8, 6]), ([8, 6], [8, 6]), ((8, 6), (8, 6)),
     ([], [])],
)  # fmt: skip
def test_widths_of_the_expander_are_read(given: Any, expected: Any) -> None:
    assert config(expander_dims=given).expander_dims == expected
    prime = config(prime={}, expander_dims=given).prime
    assert prime is not None
    assert prime["expander_dims"] == list(expected)


@pytest.mark.parametrize(
    ("name", "field"),
    [("expander_dim", "expander_dims"), ("sim_coef", "sim_coeff"), ("model_arg", "model_args"),
     ("variance_reductions", "variance_reduction")],
)  # fmt: skip
def test_a_name_that_is_nearly_a_fields_is_refused(name: str, field: str) -> None:
    message = f"^{name} is no field of VICRegConfig; did you mean {field}\\?$"
    with pytest.raises(ValueError, match=message):
        VICRegConfig(**{name: [8, 8]})  # pyright: ignore[reportArgumentType]


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


@pytest.mark.parametrize(("name", "near"), [("resnet51", "resnet50"), ("tset_vit", "test_vit")])
def test_an_unknown_architecture_is_refused_with_names_that_come_close(
    name: str, near: str
) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; close to it are .*{near}"):
        VICRegModel(config(name))


def test_an_unknown_architecture_is_refused_before_any_download() -> None:
    with pytest.raises(ValueError, match=r"timm\.list_models\(\) lists them"):
        VICRegModel(config("0123456789"))
    with pytest.raises(ValueError, match=r"'resnet51\.a1_in1k'; close to it are .*resnet50"):
        VICRegModel.from_timm("resnet51.a1_in1k")


def test_arguments_that_the_backbone_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="model_args must be arguments of timm's test_resnet"):
        VICRegModel(config(model_args={"nonsense": 1}))


def test_a_backbone_that_does_not_pool_is_refused() -> None:
    model = VICRegModel(config(model_args={"global_pool": ""}))
    with pytest.raises(ValueError, match="must pool to shape"):
        model(pixels())


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
    settings: dict[str, Any] = {"sim_coeff": 2.0, "std_coeff": 3.0, "cov_coeff": 5.0, "gamma": 1.5}
    model = trained(**settings, eps=1e-3, variance_reduction="sum").train(training)
    parts = copy.deepcopy(model)
    x, x_prime = pixels(batch=4), pixels(batch=4, seed=1)
    output = model(x, x_prime)
    y, y_prime = parts.encoder(x), parts.encoder(x_prime)
    z, z_prime = parts.expander(y), parts.expander(y_prime)
    terms = vicreg_loss(z, z_prime, **settings, eps=1e-3, variance_reduction="sum")
    for name, value in terms._asdict().items():
        assert torch.equal(output[name], value)
    assert torch.equal(output.embeddings[0], z)
    assert torch.equal(output.embeddings[1], z_prime)
    assert torch.equal(output.pooler_output, y)
    assert same_state(model, parts)  # running statistics as well


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain = trained("test_vit").train()
    saving = copy.deepcopy(plain)
    assert isinstance(saving.encoder, timm.models.VisionTransformer)
    saving.activation_checkpointing_enable()
    assert saving.encoder.grad_checkpointing
    for model in (plain, saving):
        model(pixels("test_vit"), pixels("test_vit", seed=1)).loss.backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_with_gradient_checkpointing_statistics_count_each_batch_once() -> None:
    plain = trained().train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable()
    for model in (plain, saving):
        model(pixels(batch=4), pixels(batch=4, seed=1)).loss.backward()
    assert same_state(saving, plain)
    saving.activation_checkpointing_disable()
    assert not saving.encoder.bn1._forward_hooks  # pyright: ignore


def test_a_second_branch_saves_memory_too() -> None:
    model = VICRegModel(config(weights="separate"))
    model.activation_checkpointing_enable()
    assert model.prime is not None
    for encoder in (model.encoder, model.prime.backbone):
        assert encoder.grad_checkpointing is True  # pyright: ignore


def test_local_views_need_two_others() -> None:
    with pytest.raises(ValueError, match="compared with two views, got no pixel_values_prime"):
        trained()(pixels(), local_views=[pixels()])


# From the training step to the loss


@pytest.mark.parametrize(
    ("flags", "calls"),
    [
        ([], ["forward"]),
        (["--micro_batch_size=8"], ["backward_in_chunks", "forward"]),
    ],
    ids=["one pass", "chunks"],
)
def test_training_calls_vicreg_loss_and_few_functions_before_it(
    flags: list[str], calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []

    def refuse(*_: Any, **__: Any) -> None:
        frames = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
        names = [f.f_code.co_name for f in frames if "/vicreg_hf/" in f.f_code.co_filename]
        stacks.append(names[::-1])
        raise ValueError("the loss was called")

    monkeypatch.setattr("vicreg_hf.modeling_vicreg.vicreg_loss", refuse)
    images = write_images(tmp_path / "images", rows=16)
    arguments = [*SMALL, f"--dataset_name={images}", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="the loss was called"):
        pretrain(parse_arguments([*arguments, "--max_steps=2", *flags]))
    (names,) = stacks
    assert names[names.index("take_gradients") :] == ["take_gradients", *calls]
    assert names[:2] == ["pretrain", "fit"]
