"""Runs that start from an encoder: of a run, of timm, of transformers, here and on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub import Hub
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from transformers import AutoModel
from workflow import assert_same_run, flags_of, train

from vicreg_hf import PretrainingArguments, VICRegModel, convert_checkpoint
from vicreg_hf.hub.source import read_source
from vicreg_hf.models.timm_models import adapt_backbone
from vicreg_hf.publishing.publish import publish
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def places(whole_run: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The encoder of one run in every form that others publish it in."""
    folder = tmp_path_factory.mktemp("places")
    encoder = timm.create_model(f"local-dir:{whole_run / 'encoder'}", pretrained=True)
    classifier = timm.create_model("test_resnet", num_classes=5)
    classifier.load_state_dict(encoder.state_dict(), strict=False)
    save_for_hf(classifier, str(folder / "timm"), safe_serialization=True)
    AutoModel.from_pretrained(whole_run / "encoder").save_pretrained(folder / "stock")
    unfinished = folder / "unfinished"
    shutil.copytree(whole_run / "checkpoints", unfinished / "checkpoints")
    publish(whole_run, "org/ours", include_expander=True, revision="v1")
    HfApi(endpoint=hub.endpoint).create_repo("org/timm")
    HfApi(endpoint=hub.endpoint).upload_folder(repo_id="org/timm", folder_path=folder / "timm")
    newest = max((whole_run / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    return {
        "output_dir": f"{whole_run}", "encoder": f"{whole_run / 'encoder'}",
        "checkpoint": f"{newest}", "unfinished": f"{unfinished}", "stock": f"{folder / 'stock'}",
        "timm": f"local-dir:{folder / 'timm'}", "hub": "hf-hub:org/ours@v1", "hub-timm": "org/timm",
    }  # fmt: skip


def begun(images: Path, output_dir: Path, *flags: str) -> Run:
    """A run before its first step, whose architecture is given by flags alone."""
    given = flags_of(images, output_dir, *flags)
    return setup(parse_arguments([word for word in given if word != "--architecture=test_resnet"]))


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "encoder" / "model.safetensors")


KINDS = ("output_dir", "encoder", "checkpoint", "unfinished", "stock", "timm", "hub", "hub-timm")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_an_encoder_wherever_it_is(
    kind: str, places: dict[str, str], whole_run: Path, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = begun(images, tmp_path, f"--init_from={places[kind]}")
    assert (run.step, run.args.architecture, run.inner_optimizer.state) == (0, "test_resnet", {})
    expected = weights(whole_run)
    for name, value in run.model.encoder.state_dict().items():
        assert torch.equal(value, expected[name]), name
    loaded = VICRegModel.from_pretrained(places[kind])
    assert torch.equal(loaded.encoder.state_dict()[name], expected[name])
    has_expander = kind not in ("stock", "timm", "hub-timm")
    assert ("The expander, 32-32, is new:" in capsys.readouterr().out) is not has_expander
    expander = load_file(whole_run / "encoder" / "expander.safetensors")["expander.0.weight"]
    assert torch.equal(run.model.state_dict()["expander.0.weight"], expander) is has_expander


def test_another_expander_is_new_and_its_branch_adapts_to_the_images(
    places: dict[str, str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"in_chans": 1, "output_stride": 16}
    flags = ["--expander_dims=16-16", f"--model_args={json.dumps(asked)}", "--weights=separate"]
    run = begun(images, tmp_path, f"--init_from={places['output_dir']}", *flags)
    printed = capsys.readouterr().out
    assert "The expander, 16-16, is new: that of whole is 32-32." in printed
    assert run.args.model_args == asked
    encoder: Any = run.model.encoder
    assert encoder.forward_features(torch.zeros(1, 1, 64, 64)).shape[2:] == (4, 4)
    assert run.model.prime is not None
    assert run.args.prime_init_from == places["output_dir"]
    source = read_source(places["output_dir"]).state["conv1.0.weight"]
    for branch in run.model.branches:
        found = branch.state_dict()["backbone.conv1.0.weight"]
        torch.testing.assert_close(found, source.sum(1, keepdim=True), rtol=0, atol=1e-6)


def test_a_run_resumes_to_the_same_bits_without_its_source(
    images: Path, whole_run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(whole_run, tmp_path / "source")
    flags = ["--max_steps=2", "--save_steps=1", "--weights=separate", f"--init_from={source}"]
    train(images, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for left in ("encoder", "encoder_prime", "checkpoints/step-2"):
        shutil.rmtree(tmp_path / "half" / left)
    source.rename(tmp_path / "moved")
    train(images, tmp_path / "half", *flags)
    assert_same_run(tmp_path / "half", tmp_path / "whole")
    cards = [tmp_path / name / "encoder" / "README.md" for name in ("whole", "half")]
    for card in cards:
        assert "It started from the weights of `source`." in card.read_text()
        assert str(tmp_path) not in card.read_text()
    shutil.rmtree(tmp_path / "half" / "checkpoints/step-2")
    flags[3] = f"--init_from={tmp_path / 'moved'}"
    assert setup(parse_arguments(flags_of(images, tmp_path / "half", *flags))).step == 1
    flags[3] = f"--init_from={tmp_path / 'whole'}"
    with pytest.raises(RuntimeError, match=r"init_from was .*source, is .*whole"):
        setup(parse_arguments(flags_of(images, tmp_path / "half", *flags)))


def test_weights_are_adapted_to_channels_and_size_and_refused_otherwise() -> None:
    vit: Any = timm.create_model("test_vit", num_classes=0)
    cfg = {k: v for k, v in vit.pretrained_cfg.items() if k != "architecture"}
    state, settings = vit.state_dict(), {"pretrained_cfg": cfg, "source_args": {}}
    half = {name: value.bfloat16() for name, value in state.items()}
    found: Any = adapt_backbone("test_vit", {"img_size": 64, "in_chans": 4}, state=half, **settings)
    assert found.pos_embed.shape[1] == 16 + vit.num_prefix_tokens
    expected = state["patch_embed.proj.weight"][:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(found.patch_embed.proj.weight, expected, rtol=0.01, atol=1e-3)
    assert found(torch.randn(2, 4, 64, 64)).dtype == torch.float32
    lacking = {name: value for name, value in state.items() if name != "norm.weight"}
    for wrong, key in ((lacking, "norm.weight"), (state | {"odd": torch.ones(1)}, "odd")):
        with pytest.raises(ValueError, match=f"all those of test_vit.*{key}"):
            adapt_backbone("test_vit", {}, state=wrong, **settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--architecture=resnet18"], "architecture must be that of the encoder to start from, te"),
        (['--model_args={"block_args": {}}'], "model_args must be those of the encoder to start f"),
        (["--pretrained"], "pretrained must be false with init_from"),
    ],
)
def test_settings_that_contradict_the_source_are_refused(
    flags: list[str], message: str, places: dict[str, str], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        begun(images, tmp_path, f"--init_from={places['encoder']}", *flags)


def test_places_that_hold_no_encoder_are_refused_in_a_sentence(
    places: dict[str, str], tmp_path: Path
) -> None:
    pickled, sharded, damaged, other = (tmp_path / name for name in "psdo")
    for place in (pickled, sharded, damaged, other):
        shutil.copytree(places["encoder"], place)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (sharded / "model.safetensors").rename(sharded / "model.safetensors.index.json")
    (damaged / "model.safetensors").write_bytes(b"\x10")
    (other / "config.json").write_text('{"model_type": "vit"}')
    for name, message in (
        (str(tmp_path / "none"), "init_from must be the output_dir of a run, .* is not there"),
        ("resnet18", "--architecture resnet18 --pretrained true starts from its weights"),
        (str(pickled / "pytorch_model.bin"), "is no directory. convert_checkpoint.py makes"),
        (str(tmp_path), "holds neither config.json nor a valid checkpoint"),
        (str(pickled), "pytorch_model.bin, which may hold code and is not read"),
        (str(sharded), "weights in several files"),
        (str(damaged), "its model.safetensors is damaged"),
        (str(other), "must be an encoder of timm, .* got 'vit'"),
        ("org/absent", "which the Hub does not have"),
        ("org/ours@v9", "which the Hub does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            read_source(name)


def test_terms_follow_the_weights(places: dict[str, str], tmp_path: Path) -> None:
    def terms(place: str) -> tuple[str | None, str | None]:
        facts = read_source(place).facts
        return facts["base_model"], facts["license"]

    assert terms(places["encoder"]) == terms(places["checkpoint"]) == (None, None)
    assert terms(places["hub-timm"]) == ("org/timm", "apache-2.0")
    assert terms(places["hub"])[0] == "org/ours"
    assert terms(places["stock"]) == (None, None)  # nobody says it
    converted = tmp_path / "converted"
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "r18.pth")
    convert_checkpoint(tmp_path / "r18.pth", converted)
    assert terms(str(converted)) == (None, None)
    card = ModelCard("---\nlicense: cc-by-nc-4.0\nbase_model: timm/some\n---\n")
    card.save(converted / "README.md")
    assert terms(str(converted)) == ("timm/some", "cc-by-nc-4.0")
    config = json.loads((converted / "config.json").read_text())
    config |= {"model_args": None, "num_classes": 2}  # as transformers writes it
    (converted / "config.json").write_text(json.dumps(config))
    state = load_file(converted / "model.safetensors")
    save_file(state | {"fc.weight": torch.ones(2, 512)}, converted / "model.safetensors")
    assert read_source(str(converted)).state.keys() == state.keys()


def test_a_flag_replaces_what_a_recipe_starts_from() -> None:
    args = PretrainingArguments.from_recipe("small-data", init_from="org/name")
    assert (args.init_from, args.architecture, args.pretrained) == ("org/name", None, False)
    given = parse_arguments(["--init-from", "org/name", "--architecture", "resnet18"])
    assert (given.init_from, given.architecture) == ("org/name", "resnet18")
    assert parse_arguments(["--dataset_name=x"]).architecture == "resnet50"
