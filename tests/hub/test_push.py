"""What leaves this machine: data, settings and places carry marks, of which none may be pushed."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from extracting import extract
from families import trained
from hub import Hub, connected, running_hub
from PIL import Image
from workflow import flags_of, train, write_images

from vicreg_hf import Callback, pretrain
from vicreg_hf.features import extract as extraction
from vicreg_hf.hub.api import push_files
from vicreg_hf.hub.card import LOSS_PICTURE, RETRIEVAL_PICTURE, without_photographs
from vicreg_hf.hub.push import encoder_files
from vicreg_hf.publishing.publish import publish
from vicreg_hf.search_pages.space import publish_space
from vicreg_hf.settings.command_line import parse_arguments

ACCEPTED = "cells"
"""The name of the data's folder, which a card tells; its parents' names are private. Features also
tell the name of output_dir, and the names of classes."""
EDITED = f"""# Mine
![all]({LOSS_PICTURE})
*Kept, as it is another's caption.*

Look: <img
 src="https://huggingface.co/org/name/resolve/main/{RETRIEVAL_PICTURE}" width="3"> and more.

![dogs]({RETRIEVAL_PICTURE} "dogs")

*Left, photographs
of dogs.*

<figure>

<img src="{RETRIEVAL_PICTURE}"><figcaption>dogs</figcaption>

</figure>

[dogs]: {RETRIEVAL_PICTURE}
*Kept too.*
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    home = tmp_path_factory.mktemp("MARKhome")
    with running_hub() as hub, connected(hub, home), pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "USER", "LOGNAME"):
            patch.setenv(name, str(home))
        yield hub


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes whose every name and picture carries a mark but its own."""
    place = tmp_path_factory.mktemp("MARKfolder") / ACCEPTED
    rng, told = np.random.default_rng(0), Image.Exif()
    told[0x010E] = told[0x013B] = "MARKexif"
    for split in ("train", "test"):
        for number in range(24):
            file = place / split / f"MARKclass{number % 2}" / f"MARKfile{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(file, exif=told, comment=b"MARKcomment")
    for name in ("MARKbroken.jpg", "MARKraw.cr2"):
        (place / "train" / "MARKclass0" / name).write_bytes(b"<html>")
    return place


@pytest.fixture(scope="module")
def run(hub: Hub, marked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run that was pushed to org/run, with all that it said beside it."""
    output_dir = tmp_path_factory.mktemp("MARKruns") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr("sys.stdout", said)
        train(marked, output_dir, "--max_steps=3", "--push_to_hub=true", "--hub_model_id=org/run",
              "--max_bad_fraction=0.5", "--image_size=32")  # fmt: skip
    assert "models/org/run" in hub.repositories
    (output_dir.parent / "said").write_text(said.getvalue())
    (output_dir / "encoder" / "report.html").write_text("MARKreport")
    return output_dir


def marks_in(files: Mapping[str, bytes], *, accepted: str = " ") -> set[str]:
    """The files in which a mark is found, or this machine's name, also where it is compressed."""
    found = set()
    for name, content in files.items():
        seen = content
        if name.endswith(".png"):
            seen += repr(Image.open(io.BytesIO(content)).info).encode()
        elif name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            seen += repr((table.to_pylist(), table.schema.metadata)).encode()
        hosts = [name for name in [socket.gethostname()] if len(name) > 5]  # others are everywhere
        seen = seen.replace(accepted.encode(), b"")
        if any(mark.encode() in seen for mark in ("MARK", *hosts)):
            found.add(name)
    return found


def test_a_run_pushes_neither_a_mark_nor_a_photograph_and_says_what_it_pushes(
    run: Path, hub: Hub
) -> None:
    files = hub.repositories["models/org/run"].files()
    assert RETRIEVAL_PICTURE not in files
    assert marks_in(files) == set()
    assert [name for name, content in files.items() if ACCEPTED.encode() in content] == [
        "README.md"
    ]
    card = files["README.md"].decode()
    assert "retrievals" not in card
    assert "1 left out (1 as the image cannot be decoded); files left out beside them: " in card
    assert "beside them: 1 as their endings are not those of images |" in card
    assert "license:" not in card
    assert RETRIEVAL_PICTURE in (run / "encoder" / "README.md").read_text()
    said = (run.parent / "said").read_text()
    for words in ("At the end this is pushed", "Pushing"):
        (line,) = (line for line in said.splitlines() if line.startswith(words))
        assert f"to {hub.endpoint}/org/run (public: everybody can see it): README.md, " in line
        assert "None of them shows images of the data" in line
        assert "Licence: none; --license chooses one." in line
    assert said.index("At the end") < said.index("step 1/3") < said.index("Pushing")


def test_photographs_are_pushed_on_request_and_deleted_by_a_push_without(
    run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(run, "org/shown", publish_images=True, license="cc-by-4.0", onnx=True)
    files = hub.repositories["models/org/shown"].files
    assert files()[RETRIEVAL_PICTURE] == (run / "encoder" / RETRIEVAL_PICTURE).read_bytes()
    assert RETRIEVAL_PICTURE in files()["README.md"].decode()
    assert marks_in(files()) == set()
    nodes = onnx.load_from_string(files()["onnx/model.onnx"]).graph.node
    assert not any(node.metadata_props or node.doc_string for node in nodes)  # as stack traces
    said = capsys.readouterr().out
    assert f"{RETRIEVAL_PICTURE} shows images of the data" in said
    assert "Licence: cc-by-4.0." in said
    push_files({"README.md": EDITED.encode()}, "org/shown", commit_message="-")
    trained().push_to_hub("org/shown")
    assert RETRIEVAL_PICTURE not in files()
    assert files()["README.md"].decode() == without_photographs(EDITED)
    assert f"{RETRIEVAL_PICTURE} of an earlier push is deleted" in capsys.readouterr().out


def test_a_card_tells_no_path_of_data_that_are_no_longer_there(tmp_path: Path) -> None:
    class Unplug(Callback):
        def on_step(self, *_: Any) -> None:
            gone.rename(tmp_path / "gone")

    gone, out = write_images(tmp_path / "MARKdisk" / ACCEPTED), tmp_path / "out"
    pretrain(parse_arguments(flags_of(gone, out, "--max_steps=1")), callbacks=[Unplug()])
    card = (out / "encoder" / "README.md").read_bytes()
    assert f"the local data set `{ACCEPTED}`".encode() in card
    assert marks_in({"README.md": card}) == set()


def test_a_card_keeps_all_but_photographs() -> None:
    text = without_photographs(EDITED)
    assert "retrievals" not in text
    assert "dogs" not in text
    for kept in (f"![all]({LOSS_PICTURE})\n*Kept, as", "Look:  and more.", "*Kept too.*"):
        assert kept in text
    assert without_photographs(text) == text


def test_features_are_pushed_without_the_names_of_files(
    run: Path, marked: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "features"
    (output / "data").mkdir(parents=True)
    for name in ("hits.html", "data/hits.html", "report.png"):
        (output / name).write_text("MARKreport")
    settings = {"push_to_hub": True, "hub_dataset_id": "org/feats", "max_bad_fraction": 0.5}
    complete, aside = extraction.complete_parts, marked.parent / "unplugged"
    monkeypatch.setattr(  # the disk of the data goes before the push
        extraction, "complete_parts", lambda *a, **b: (complete(*a, **b), marked.rename(aside))
    )
    extract(run, marked, output, **settings)
    aside.rename(marked)
    files = hub.repositories["datasets/org/feats"].files()
    assert {name.partition("-")[0] for name in files} == {"README.md", "data/train", "data/test"}
    said = capsys.readouterr().out
    assert said.count("They hold no images, but features") == 2
    at_the_start = f"At the end this is pushed to {hub.endpoint}/datasets/org/feats (public: "
    assert said.index(at_the_start) < said.index("Pushing to ")
    assert "the classes MARKclass0, MARKclass1" in said
    assert marks_in(files, accepted="MARKclass") == set()
    ids = pq.read_table(io.BytesIO(next(v for k, v in files.items() if "train" in k)))["image_id"]
    assert all(each.isdigit() for each in ids.to_pylist())


def test_what_configurations_tell_of_places_stays_here(tmp_path: Path) -> None:
    """Releases of transformers note there from which directory something was loaded."""
    kept = {"model_type": "vit", "text_config": {"hidden_size": 8}}
    told = kept | {"_name_or_path": "/home/MARKuser", "text_config": {
        "_name_or_path": "MARKfolder/encoder", "hidden_size": 8}}  # fmt: skip
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(told | {"name_or_path": "../MARKfolder"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    files = encoder_files(tmp_path)
    assert files.pop("preprocessor_config.json") == tmp_path / "preprocessor_config.json"
    assert [json.loads(bytes(files[name])) for name in sorted(files)] == [kept, kept]


@pytest.mark.parametrize("publish_images", [False, True])
def test_a_space_tells_names_of_classes_alone_and_shows_images_on_request(
    publish_images: bool, run: Path, marked: Path, hub: Hub, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "features"
    extract(run, marked, output, max_bad_fraction=0.5)
    for name in ("hits.html", "data/hits.html", "report.png"):
        (output / name).write_text("MARKreport")
    publish_space(output, "org/find", publish_images=publish_images)
    repository = hub.repositories.pop("spaces/org/find")
    files = repository.files()
    assert repository.private
    assert "the classes MARKclass0, MARKclass1" in capsys.readouterr().out
    assert marks_in(files, accepted="MARKclass") == set()
    assert marks_in(files) == {"search.json"}
    # the folder of the data and of the run, as in other cards
    named = {name for name, content in files.items() if ACCEPTED.encode() in content}
    assert named - {"app.py"} == {"README.md", "search.json"}
    pictures = {name for name in files if name.startswith("thumbnails/")}
    assert bool(pictures) is publish_images
    shown = dict.fromkeys(files, 0)
    for name, content in files.items():
        shown[name] = content.count(b"JFIF") + content.count(b"\x89PNG\r\n\x1a\n")
    assert sum(shown[name] for name in pictures) == (48 if publish_images else 0)
    assert not any(shown[name] for name in files.keys() - pictures)
