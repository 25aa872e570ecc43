"""One repository that every loader takes; transformers and timm themselves are the reference."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from vicreg_hf import VICRegConfig, VICRegModel, VICRegOutput, vicreg_loss

# One of every kind of backbone, small: name in timm -> arguments.
FAMILIES: dict[str, dict[str, Any] | None] = {
    "test_resnet": None,
    "resnet10t": {"global_pool": "catavgmax"},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "test_convnext": None,
    "test_efficientnet": None,
    "mobilenetv4_conv_small": None,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 2, "embed_dim": 24, "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
    },
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "test_mambaout": None,
    "test_byobnet": None,
    "test_nfnet": None,
}  # fmt: skip
WIDTHS = (
    "expander_dims must be positive widths, as [8192, 8192, 8192], or these joined by '-', as "
    "8192-8192-8192,"
)
FIXED_SIZES = {"test_vit": 32, "swin_tiny_patch4_window7_224": 32, "eva02_tiny_patch14_224": 28}


def config(architecture: str = "test_resnet", **settings: Any) -> VICRegConfig:
    settings = {"model_args": FAMILIES.get(architecture), "expander_dims": [8, 6]} | settings
    return VICRegConfig(architecture=architecture, **settings)


def trained(architecture: str = "test_resnet", **settings: Any) -> VICRegModel:
    """A model whose every parameter and running statistic differs from its initial value."""
    torch.manual_seed(0)
    model = VICRegModel(config(architecture, **settings))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.mul_(1 + torch.rand_like(tensor))
            elif tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
    return model.eval()


def pixels(architecture: str = "test_resnet", *, batch: int = 2, seed: int = 0) -> Tensor:
    side = FIXED_SIZES.get(architecture, 64)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def photograph() -> Image.Image:
    noise = torch.randint(256, (3, 10, 14), generator=torch.Generator().manual_seed(0))
    return tv.to_pil_image(noise.to(torch.uint8)).resize((200, 150))


def same_state(model: nn.Module, other: nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


# What is written


def test_the_published_encoder_has_timms_names_and_values(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    saved, expected = load_file(tmp_path / "model.safetensors"), model.encoder.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize(
    ("include_expander", "expected"),
    [
        (True, {"config.json", "model.safetensors", "expander.safetensors",
                "vicreg.safetensors.index.json"}),
        (False, {"config.json", "model.safetensors"}),
    ],
)  # fmt: skip
def test_saving_writes_these_files_and_removes_an_older_expander(
    include_expander: bool, expected: set[str], tmp_path: Path
) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, include_expander=include_expander)
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "absent", is_main_process=False)
    assert not (tmp_path / "absent").exists()


def test_half_precision_is_published_as_float32(tmp_path: Path) -> None:
    trained().bfloat16().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {v.dtype for v in saved.values() if v.is_floating_point()} == {torch.float32}


def test_config_drops_where_the_registrys_weights_came_from(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "timm_wrapper"
    assert not {"tag", "hf_hub_id", "url", "license"} & written["pretrained_cfg"].keys()


# Fields of the configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sim_coeff": float("nan")}, "sim_coeff must be a finite number of at least 0, got nan."),
        ({"std_coeff": -1}, "std_coeff must be a finite number of at least 0, got -1."),
        ({"cov_coeff": "1"}, "cov_coeff must be a finite number of at least 0, got '1'."),
        ({"gamma": None}, "gamma must be a finite number of at least 0, got None."),
        ({"gamma": True}, "gamma must be a finite number of at least 0, got True."),
        ({"eps": float("inf")}, "eps must be a finite number above 0, got inf."),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0."),
        ({"variance_reduction": "max"}, "variance_reduction must be mean or sum, got 'max'."),
        ({"variance_reduction": ["sum"]}, "variance_reduction must be mean or sum, got ['sum']."),
        ({"expander_dims": [8, 0]}, f"{WIDTHS} got [8, 0]."),
        ({"expander_dims": (-8,)}, f"{WIDTHS} got (-8,)."),
        ({"expander_dims": [8.5]}, f"{WIDTHS} got [8.5]."),
        ({"expander_dims": [True]}, f"{WIDTHS} got [True]."),
        ({"expander_dims": ["8"]}, f"{WIDTHS} got ['8']."),
        ({"expander_dims": 8}, f"{WIDTHS} got 8."),
        ({"expander_dims": None}, f"{WIDTHS} got None."),
        ({"expander_dims": "8,8"}, f"{WIDTHS} got '8,8'."),
        ({"expander_dims": ""}, f"{WIDTHS} got ''."),
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


# Loading as VICRegModel


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


def test_settings_of_the_method_come_back(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "expander_dims": [5, 3], "sim_coeff": 2.0, "std_coeff": 3.0, "cov_coeff": 5.0,
        "gamma": 1.5, "eps": 1e-3, "variance_reduction": "sum",
    }  # fmt: skip
    trained(**settings).save_pretrained(tmp_path)
    loaded = VICRegModel.from_pretrained(tmp_path).config
    assert {name: getattr(loaded, name) for name in settings} == settings


def load_without_expander(path: Path) -> tuple[VICRegModel, str]:
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as captured:
        model = VICRegModel.from_pretrained(path)
    return model, captured.out


def test_without_its_expander_a_model_loads_with_a_warning(tmp_path: Path) -> None:
    expected = trained()
    expected.save_pretrained(tmp_path, include_expander=False)
    model, warning = load_without_expander(tmp_path)
    assert same_state(model.encoder, expected.encoder)
    assert "expander" in warning
    assert "newly initialized" in warning
    assert "backbone" not in warning


def test_a_new_expander_is_initialised_as_torch_does(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path, include_expander=False)
    model, _ = load_without_expander(tmp_path)
    linear, norm = model.expander[0], model.expander.state_dict()
    assert isinstance(linear, nn.Linear)
    bound = linear.in_features**-0.5
    assert 0.5 * bound < float(linear.weight.detach().abs().max()) <= bound
    assert torch.equal(norm["1.weight"], torch.ones(8))
    assert torch.equal(norm["1.running_var"], torch.ones(8))


def test_a_model_with_its_expander_loads_without_a_warning(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    assert load_without_expander(tmp_path)[1] == ""


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_training_checkpoint_loads_through_auto_model(architecture: str, tmp_path: Path) -> None:
    expected = trained(architecture)
    PreTrainedModel.save_pretrained(expected, tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is VICRegModel
    assert same_state(model, expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_than_three_channels_round_trip(channels: int, tmp_path: Path) -> None:
    expected = trained(model_args={"in_chans": channels})
    expected.save_pretrained(tmp_path)
    model, x = VICRegModel.from_pretrained(tmp_path), torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x).pooler_output, expected(x).pooler_output)
        stock_model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(stock_model(x), expected(x).pooler_output)


# Building


@pytest.mark.parametrize("architecture", FAMILIES)
def test_timms_own_initialisation_is_kept(architecture: str) -> None:
    torch.manual_seed(7)
    bare = timm.create_model(architecture, **{**(FAMILIES[architecture] or {}), "num_classes": 0})
    torch.manual_seed(7)
    assert same_state(VICRegModel(config(architecture)).encoder, bare)


def test_the_last_norm_of_every_residual_branch_starts_at_zero() -> None:
    encoder = VICRegModel(config("resnet10t")).encoder
    last = {k: v for k, v in encoder.state_dict().items() if k.endswith("0.bn2.weight")}
    assert len(last) == 4
    assert not any(weight.any() for weight in last.values())


def test_classes_in_model_args_are_left_out() -> None:
    model = VICRegModel(config(model_args={"num_classes": 10, "drop_path_rate": 0.1}))
    assert model(pixels()).pooler_output.shape == (2, model.num_features)
    assert model.config.model_args == {"drop_path_rate": 0.1}


def test_a_pretrained_tag_is_no_part_of_the_architecture() -> None:
    assert VICRegModel(config("test_resnet.r160_in1k")).config.architecture == "test_resnet"


@pytest.mark.parametrize(("name", "near"), [("resnet51", "resnet50"), ("tset_vit", "test_vit")])
def test_an_unknown_architecture_is_refused_with_names_that_come_close(
    name: str, near: str
) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; close to it are .*{near}"):
        VICRegModel(config(name))


def test_an_architecture_like_no_other_is_refused_with_where_to_look() -> None:
    with pytest.raises(ValueError, match=r"timm\.list_models\(\) lists them"):
        VICRegModel(config("0123456789"))


def test_from_timm_refuses_an_unknown_architecture_before_any_download() -> None:
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


def test_the_loss_reaches_every_parameter() -> None:
    model = trained().train()
    model(pixels(batch=4), pixels(batch=4, seed=1)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


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
    for model in (plain, saving, saving):
        model(pixels(batch=4), pixels(batch=4, seed=1)).loss.backward()
        if model is plain:
            continue
        assert same_state(saving, plain)
        saving.activation_checkpointing_disable()
        plain(pixels(batch=4), pixels(batch=4, seed=1))
    assert not saving.encoder.bn1._forward_hooks  # pyright: ignore


def test_a_second_branch_saves_memory_too() -> None:
    model = VICRegModel(config(weights="separate"))
    model.activation_checkpointing_enable()
    assert model.prime is not None
    for encoder in (model.encoder, model.prime.backbone):
        assert encoder.grad_checkpointing is True  # pyright: ignore


def test_what_accelerate_and_trainer_save_with_changes_nothing(tmp_path: Path) -> None:
    model = trained()
    for name, more in {
        "plain": {},
        "accelerate": {"save_function": torch.save, "state_dict": model.state_dict()},
        "trainer": {"safe_serialization": True, "max_shard_size": "5GB", "push_to_hub": False},
    }.items():
        given: Any = more
        model.save_pretrained(tmp_path / name, is_main_process=True, **given)
        for file in ("model.safetensors", "expander.safetensors", "config.json"):
            expected = (tmp_path / "plain" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == expected
    with pytest.raises(ValueError, match=r"takes?, got variant; leave it out"):
        model.save_pretrained(tmp_path / "other", variant="fp16")
    assert not (tmp_path / "other").exists()


def test_weights_of_an_encoder_alone_are_refused_by_the_whole_model(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for strict in (True, False):
        with pytest.raises(ValueError, match="backbone and expander, got the weights of a publish"):
            VICRegModel(config()).load_state_dict(weights, strict=strict)
    other = VICRegModel(config())
    other.load_state_dict(model.state_dict())
    assert same_state(other, model)
    other.encoder.load_state_dict(weights)


def test_local_views_need_two_others() -> None:
    with pytest.raises(ValueError, match="compared with two views, got no pixel_values_prime"):
        trained()(pixels(), local_views=[pixels()])


def test_without_a_loss_two_views_are_those_of_an_encoder() -> None:
    model = trained()
    output = model(pixels(), pixels(seed=1), return_loss=False)
    assert output.keys() == model(pixels()).keys()


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
