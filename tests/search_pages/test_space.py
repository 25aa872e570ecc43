"""A Space: what is pushed, and that it finds what search finds, without this package."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from encoders import vit
from extracting import extract, write_encoder, write_folder
from families import trained
from hub import READER, Hub, connected, running_hub
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from uploads import UNUSABLE, USABLE, write_uploads
from workflow import ROOT

from vicreg_hf.commands.publish import main
from vicreg_hf.data.columns import image_files
from vicreg_hf.features.search import nearest_images
from vicreg_hf.hub.api import HubError
from vicreg_hf.search_pages import app
from vicreg_hf.search_pages.app import Space, UnusableError
from vicreg_hf.search_pages.space import GRADIO, publish_space

pytestmark = pytest.mark.usefixtures("own_cache")
PAGES = {"README.md", "app.py", "cases.css", "cases.html.jinja", "requirements.txt", "search.json"}
FEATURES = {
    f"features/{name}.safetensors"
    for name in ("test-00000-of-00001", *(f"train-{k:05d}-of-00004" for k in range(4)))
}
THUMBNAILS = {name.replace("features/", "thumbnails/") for name in FEATURES}
WEIGHTS = {"encoder/config.json", "encoder/model.safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, an encoder, the features of the former by the latter, and uploads."""
    place = tmp_path_factory.mktemp("space")
    photos = write_folder(place / "photos")
    extract(write_encoder(place / "encoder"), photos, place / "features")
    with Image.open(photos / "train" / "dog" / "00.png") as image:
        write_uploads(place / "uploads", image)
    return place


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        yield hub


def downloaded(folder: Path, name: str = "org/find") -> Space:
    return Space(Path(snapshot_download(name, repo_type="space", local_dir=folder)))


def pushed(hub: Hub, name: str = "org/find") -> dict[str, bytes]:
    return hub.repositories[f"spaces/{name}"].files()


def test_a_private_space_finds_what_search_finds(
    place: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(place / "features"), "--space", "org/find"])
    said = capsys.readouterr().out
    assert "spaces/org/find (private: only its members see it): README.md, app.py" in said
    assert "It shows no image of the data, but holds features of 38 images, the classes cat" in said
    assert "Licence: none; --license chooses one." in said
    assert 'Whoever sees it reads there: "Most similar images in photos. By cosine' in said
    assert "Published: " in said
    assert hub.repositories["spaces/org/find"].private
    assert pushed(hub).keys() == PAGES | FEATURES | WEIGHTS
    card = pushed(hub)["README.md"].decode()
    assert "sdk: gradio\nsdk_version: " in card
    assert f"transformers=={transformers.__version__}\n" in pushed(hub)["requirements.txt"].decode()
    space, query = downloaded(tmp_path / "space"), place / "photos" / "train" / "cat" / "04.png"
    case = space.find(str(query))
    (expected,) = nearest_images(place / "features", [query])
    for hit, near in zip(case.hits, expected.nearest, strict=True):
        assert hit.similarity == pytest.approx(near.similarity, abs=1e-5)
        assert hit.name == f"{hit.split}, row {hit.row}"
        assert hit.picture is None
    rows = {(hit.split, hit.row, hit.label) for hit in case.hits}
    assert len(rows & {(near.split, near.row, near.label) for near in expected.nearest}) >= 7


def test_a_space_has_the_gradio_that_tests_have() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"gradio=={GRADIO}" in extra["test"]


def test_a_space_reads_what_the_package_reads() -> None:
    assert (app.FORMATS, app.MAX_PIXELS) == (image_files.FORMATS, image_files.MAX_PIXELS)


def test_unusual_uploads_are_searched_and_unusable_ones_refused(
    place: Path,
    hub: Hub,  # noqa: ARG001 - it is that of the push
    tmp_path: Path,
) -> None:
    publish_space(place / "features", "org/find")
    space = downloaded(tmp_path / "space")
    for name, note in USABLE.items():
        case = space.find(str(place / "uploads" / name))
        assert case.note == note
        assert len(case.hits) == 8
    upright = case.hits[0]  # of the image that EXIF turns
    assert upright.similarity > 0.98
    for name in UNUSABLE:
        with pytest.raises(UnusableError, match="This file cannot be used: "):
            space.find(str(place / "uploads" / name))


def test_pictures_are_pushed_on_request_and_deleted_by_a_push_without(
    place: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_space(place / "features", "org/find", publish_images=True, license="cc-by-4.0")
    said = capsys.readouterr().out
    assert "It shows every image of the data as a thumbnail" in said
    assert "Licence: cc-by-4.0." in said
    assert pushed(hub).keys() == PAGES | FEATURES | WEIGHTS | THUMBNAILS
    assert "license: cc-by-4.0\n" in pushed(hub)["README.md"].decode()
    case = downloaded(tmp_path / "space").find(str(place / "photos" / "train" / "cat" / "04.png"))
    assert all(hit.picture.uri.startswith("data:image/") for hit in case.hits)
    sizes = {(hit.picture.width, hit.picture.height) for hit in case.hits}
    assert (60, 40) in sizes
    publish_space(place / "features", "org/find")
    assert pushed(hub).keys() == PAGES | FEATURES | WEIGHTS
    assert "thumbnails/train-00000-of-00004.safetensors" in capsys.readouterr().out
    shutil.move(place / "photos", tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match="there is no file or folder"):
            publish_space(place / "features", "org/other", publish_images=True)
    finally:
        shutil.move(tmp_path / "moved", place / "photos")
    assert "spaces/org/other" not in hub.repositories


def test_an_encoder_on_the_hub_is_loaded_from_there(
    place: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained().push_to_hub("org/other")
    HfApi().create_repo("org/encoder", private=True)
    HfApi().upload_folder(repo_id="org/encoder", folder_path=place / "encoder")
    with pytest.raises(ValueError, match="model must be the encoder of the features"):
        publish_space(place / "features", "org/find", model="org/other")
    publish_space(place / "features", "org/find", model="org/encoder", private=False)
    assert not hub.repositories["spaces/org/find"].private
    with pytest.raises(ValueError, match="private must be left out for a repository that"):
        publish_space(place / "features", "org/find", model="org/encoder", private=True)
    assert "org/encoder is private: give the Space a token" in capsys.readouterr().out
    assert pushed(hub).keys() == PAGES | FEATURES
    assert "models:\n- org/encoder\n" in pushed(hub)["README.md"].decode()
    settings = json.loads(pushed(hub)["search.json"])
    repository = hub.repositories["models/org/encoder"]
    assert settings["revision"] == repository.sha(repository.branches["main"])
    # what the Hub has by now does not matter
    trained("test_vit").push_to_hub("org/encoder")
    space, query = downloaded(tmp_path / "space"), place / "photos" / "train" / "cat" / "04.png"
    assert space.find(str(query)).hits[0].similarity > 0.999


@pytest.mark.parametrize("kind", ["checkpoint", "transformers"])
def test_other_encoders_are_pushed_as_they_load(
    kind: str, place: Path, hub: Hub, tmp_path: Path
) -> None:
    if kind == "transformers":
        vit(tmp_path / "encoder", pooler=False)
    else:
        transformers.PreTrainedModel.save_pretrained(trained(), tmp_path / "encoder")
    extract(tmp_path / "encoder", place / "photos", tmp_path / "features")
    publish_space(tmp_path / "features", "org/find")
    assert pushed(hub).keys() >= PAGES | WEIGHTS
    query = place / "photos" / "train" / "cat" / "04.png"
    assert downloaded(tmp_path / "space").find(str(query)).hits[0].similarity > 0.999


def test_what_cannot_be_a_space_is_refused_and_another_app_is_left_alone(
    place: Path, hub: Hub, tmp_path: Path
) -> None:
    def refused(sentence: str, features: Path = place / "features", **settings: Any) -> None:
        name = settings.pop("name", "org/find")
        with pytest.raises(ValueError, match=sentence):
            publish_space(features, name, **settings)
        assert "spaces/org/find" not in hub.repositories

    refused("space must be org/name", name="a/b/c")
    refused("license must be an identifier", license="My Licence")
    refused("features must be a directory that extract wrote", place / "photos")
    ours = trained("resnet18_cifar", model_args=None)
    ours.save_pretrained(tmp_path / "ours", include_expander=False)
    extract(tmp_path / "ours", place / "photos", tmp_path / "features")
    refused("must have an encoder that stock timm knows, got resnet18_cifar", tmp_path / "features")
    for names in (["index.html"], ["app.py", "search.json"]):
        theirs: Any = {"repo_id": f"org/{names[0]}", "repo_type": "space"}
        HfApi().create_repo(**theirs, space_sdk="gradio")
        held = {"README.md": b"---\nsdk: static\n---\n"} | dict.fromkeys(names, b"{}")
        for path, content in held.items():
            HfApi().upload_file(path_in_repo=path, path_or_fileobj=content, **theirs)
        refused(f"got {theirs['repo_id']}, which holds another app", name=theirs["repo_id"])
        assert pushed(hub, theirs["repo_id"]) == held
    for words, sentence in {
        (): "one of repo_id, for an encoder, and space, for a page, must be given, got none",
        ("--space=org/find", "--repo_id=org/a"): "must be given, got both org/a and org/find",
        ("--space=org/find", "--onnx"): "onnx belongs to repo_id; leave it out",
        ("--repo_id=org/a", "--model=org/b"): "model belongs to space; leave it out",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            main([str(place / "features"), *words])


def test_a_push_that_breaks_is_repeated_and_leaves_the_earlier_space(
    place: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vicreg_hf.hub.api.FIRST_WAIT", 0.01)
    hub.fail("POST", "/api/spaces/org/find/commit/", 503, times=2)
    publish_space(place / "features", "org/find")
    before = pushed(hub)
    hub.fail("POST", "/api/spaces/org/find/commit/", 503)
    with pytest.raises(HubError, match=r"tried 3 times: .*\nThe same command pushes the Space"):
        publish_space(place / "features", "org/find", publish_images=True)
    assert pushed(hub) == before
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="needs an access token that may write there"):
        publish_space(place / "features", "org/new")
