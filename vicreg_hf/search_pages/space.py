"""The page that searches a data set as a Space of the Hub, which runs without this package.

Shapes: N rows of a part, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoConfig

from vicreg_hf.data.opening import DEMO
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.report.gallery import STYLES, thumbnail
from vicreg_hf.features.encode import encode_with
from vicreg_hf.features.encoders import encoder_directory
from vicreg_hf.features.parts import features_of
from vicreg_hf.features.pictures import open_pictures, picture
from vicreg_hf.features.search import Search, open_search
from vicreg_hf.hub.api import (
    HubError,
    check_licence,
    check_repo_id,
    look_at,
    open_repository,
    push_files,
    read_text,
    visible_files,
)
from vicreg_hf.hub.card import CARD_FILE
from vicreg_hf.hub.export import export_encoder
from vicreg_hf.hub.push import NO_LICENCE, describe_push, encoder_files, licence_of
from vicreg_hf.models.resnets import is_ours
from vicreg_hf.publishing.loading import load_model
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.files import temporary_folder
from vicreg_hf.search_pages import app
from vicreg_hf.search_pages.hits import describe

GRADIO = "6.31.0"
"""The version of gradio that the page was tested with."""
PYTHON = "3.11"
K = 8
"""Images that the page shows for each query."""
ENCODER = "encoder"
"""The folder of the encoder's files, where they are in the Space."""
NEW = {"README.md", ".gitattributes"}
"""Files that the Hub itself puts into a new Space."""
REQUIRED = ("torch", "torchvision", "transformers", "timm", "safetensors")
ALIKE = 0.999
"""Least cosine similarity of an image's features as the Space makes them and as extraction did."""


@dataclass(frozen=True)
class Place:
    """Where a Space loads its encoder from."""

    name: str
    """An id on the Hub, or a folder of the Space."""
    revision: str | None
    """The commit, on the Hub."""
    files: Mapping[str, Path | bytes]
    """What is pushed for it."""
    source: str
    """Where it is loaded from on this machine."""
    card: str | None
    private: bool = False
    """Whether it is a repository that only its members see."""


def publish_space(
    features: str | Path,
    space_id: str,
    *,
    model: str | None = None,
    private: bool | None = None,
    license: str | None = None,  # noqa: A002
    publish_images: bool = False,
    token: str | bool | None = None,
) -> str:
    """Push a page that searches extracted features, as a Space of gradio, in one commit.

    The features, the row numbers and the names of classes are pushed, and the encoder's files where
    it is on this machine; names of files are not.

    Args:
        features: directory that `extract_dataset` wrote.
        space_id: `org/name`, made if absent.
        model: the encoder, by default where it was when the features were extracted.
        private: as `open_repository` takes it; a new Space is private where it is None.
        license: of the Space; None takes that which the encoder's card states.
        publish_images: also push thumbnails of all images, without which rows are named alone.
        token: None takes that of HF_TOKEN or `hf auth login`.

    Returns:
        Address of the commit.

    Raises:
        ValueError: no features there, an encoder that stock transformers does not load as the same,
            images that are asked for and cannot be opened, or a Space that is another app, or
            public where it is to be private.
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    check_repo_id(space_id, "space")
    if license is not None:
        check_licence(license)
    search = open_search(features, model=model)
    images = open_pictures(search.record, search.encoder) if publish_images else {}
    with temporary_folder() as folder:
        place = _place(search, model, folder / "exported", token)
        _check_stock(search, place)
        target: Any = {"token": token, "repo_type": "space"}
        space_id = open_repository(space_id, private=private, new_private=True, **target)
        there = look_at(space_id, **target).files
        if there - NEW and not {app.SETTINGS, app.TEMPLATE} <= there:
            raise ValueError(
                f"space must be new or a page that this command has pushed, got {space_id}, which "
                "holds another app; choose another name."
            )
        licence = license or licence_of(place.card)
        _write_pages(search, place, folder / "space", licence)
        _write_rows(search, images, folder / "space")
        files = {**visible_files(folder / "space")}
        files |= {f"{ENCODER}/{name}": file for name, file in place.files.items()}
        gone = [name for name in there - files.keys() if _ours(name)]
        try:
            print(
                describe_push(
                    space_id, files, shows=_shown(search, place, images), removed=gone,
                    licence=licence or NO_LICENCE, **target,
                )
            )  # fmt: skip
            return push_files(
                files, space_id, commit_message="Upload a page that searches images",
                removable=_ours, **target,
            )  # fmt: skip
        except HubError as error:
            raise HubError(f"{error}\nThe same command pushes the Space again.") from None


def _ours(name: str) -> bool:
    """Whether a file of an earlier push is deleted when a push has none of its name."""
    return name.startswith((f"{app.FEATURES}/", f"{app.THUMBNAILS}/", f"{ENCODER}/"))


def _place(search: Search, model: str | None, folder: Path, token: str | bool | None) -> Place:
    """Where the Space finds the encoder; a checkpoint is exported to the folder."""
    name = model or str(search.record["model"])
    if not Path(name).exists():
        revision = search.record.get("revision") if model is None else None
        known = look_at(name, revision=revision, token=token)
        card = read_text(name, CARD_FILE, revision=known.commit, token=token)
        return Place(name, known.commit, {}, name, card, known.private)
    directory = Path(encoder_directory(name))
    file = directory / CARD_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else None
    if AutoConfig.from_pretrained(directory).model_type == "vicreg":
        directory = export_encoder(load_model(directory)[0], folder)
    files = {name: file for name, file in encoder_files(directory).items() if name != CARD_FILE}
    return Place(ENCODER, None, files, str(directory), text)


def _check_stock(search: Search, place: Place) -> None:
    """Make sure that the Space, which has no vicreg_hf, will encode as extraction did.

    Raises:
        ValueError: it will not.
    """
    encoder = search.encoder
    architecture = encoder.identity.get("architecture")
    if encoder.sound is not None or encoder.in_chans not in (1, 3):
        raise ValueError(
            "a Space must have an encoder of photographs, RGB or gray, got one of "
            f"{'sounds' if encoder.sound is not None else f'{encoder.in_chans} channels'}; "
            "search --serve shows the same page on this machine."
        )
    if architecture is not None and is_ours(architecture):
        raise ValueError(
            f"a Space must have an encoder that stock timm knows, got {architecture}, which only "
            "vicreg_hf has; search --serve shows the same page on this machine."
        )
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
    image = image.convert("L" if encoder.in_chans == 1 else "RGB")
    pixels = np.atleast_3d(np.array(image)).transpose(2, 0, 1)
    prepared = encoder.prepare(torch.from_numpy(np.ascontiguousarray(pixels)))
    expected = encode_with(encoder, prepared[None], next(encoder.module.parameters()).device)
    try:
        found = torch.from_numpy(_stock(search, place)(image))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ValueError(
            f"a Space must have an encoder that stock transformers loads, and {place.name} does "
            f"not load there: {one_line(error)[:300]}"
        ) from error
    alike = torch.cosine_similarity(found, expected[0].cpu(), dim=0)
    if not alike >= ALIKE:
        raise ValueError(
            f"a Space must encode as extraction does, and stock transformers gives {place.name} "
            f"features of cosine similarity {float(alike):.3f} to those; export the encoder anew."
        )


def _settings(search: Search, place: Place) -> dict[str, Any]:
    title, about = describe(search)
    return {
        "title": title, "about": about, "model": place.name, "revision": place.revision, "k": K,
        "trained_pooler": getattr(search.encoder.module, "trained_pooler", True),
        "channels": search.encoder.in_chans, "value_range": search.value_range,
        "classes": search.record["classes"],
    }  # fmt: skip


def _stock(search: Search, place: Place) -> app.StockEncoder:
    settings = _settings(search, place)
    names = ("revision", "trained_pooler", "channels")
    return app.StockEncoder(place.source, **{name: settings[name] for name in names})


def _write_pages(search: Search, place: Place, folder: Path, licence: str | None) -> None:
    """Write what the Space runs, its settings, and its card."""
    folder.mkdir()
    settings = _settings(search, place)
    own = Path(app.__file__).parent
    for file in (own / "app.py", own / app.TEMPLATE, STYLES / app.CSS):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / app.SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    lines = [f"{name}=={version(name).partition('+')[0]}" for name in REQUIRED]
    (folder / "requirements.txt").write_text("\n".join([*lines, "jinja2", "pi-heif", "pillow", ""]))
    data = search.record.get("dataset_name") or DEMO
    card: dict[str, Any] = {
        "title": settings["title"][:60], "emoji": "🔎", "colorFrom": "blue", "colorTo": "gray",
        "sdk": "gradio", "sdk_version": GRADIO, "python_version": PYTHON, "app_file": "app.py",
        "pinned": False, "tags": ["vicreg", "image-similarity"],
    }  # fmt: skip
    card |= {} if place.files else {"models": [place.name]}
    card |= {} if data == DEMO or Path(data).is_absolute() else {"datasets": [data]}
    card |= {"license": licence} if licence else {}
    text = (
        f"# {settings['title']}\n\n{settings['about']} Drop an image into the page; it is compared "
        "with the features in this Space, exactly. Written by `vicreg-hf publish --space` of "
        "vicreg_hf, which the Space does not need.\n"
    )
    metadata = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    (folder / CARD_FILE).write_text(f"---\n{metadata}---\n\n{text}", encoding="utf-8")


def _write_rows(search: Search, images: Mapping[str, ImageSplit], folder: Path) -> None:
    """Write features, row numbers and classes of each part, and thumbnails if there are images."""
    for kind in (app.FEATURES, app.THUMBNAILS) if images else (app.FEATURES,):
        (folder / kind).mkdir()
    with tqdm(total=search.num_rows, unit="image", disable=not images) as bar:
        for part_file, part in zip(search.files, search.parts, strict=True):
            table = part.table
            if not len(table):  # all of its images were bad
                continue
            name = f"{part_file.file.stem}.safetensors"
            rows = table["row"].to_numpy()
            labels = np.full(len(rows), -1)
            if "label" in table.column_names:
                labels = table["label"].fill_null(-1).to_numpy().astype(np.int64)
            save_file(
                {"features": np.ascontiguousarray(features_of(table)), "row": rows.copy(),
                 "label": labels},
                folder / app.FEATURES / name,
            )  # fmt: skip
            if images:
                held = _thumbnails(images, part.split, table, bar)
                save_file(held, folder / app.THUMBNAILS / name)


def _thumbnails(
    images: Mapping[str, ImageSplit], split: str, table: pa.Table, bar: Any
) -> dict[str, Any]:
    """Small pictures of the rows of a part, drawn anew from pixels, in one array of bytes."""
    files, sizes = [], []
    for row in table["row"].to_pylist():
        image = picture(images, split, row)
        drawn = None if image is None else thumbnail(image, app.THUMBNAIL)
        files.append(b"" if drawn is None else drawn.data)
        sizes.append((0, 0) if drawn is None else (drawn.width, drawn.height))
        bar.update()
    return {
        "files": np.frombuffer(b"".join(files), np.uint8), "sizes": np.array(sizes, np.int64),
        "bounds": np.cumsum([0, *map(len, files)], dtype=np.int64),
    }  # fmt: skip


def _shown(search: Search, place: Place, images: Mapping[str, ImageSplit]) -> str:
    """Sentences on what of the data a Space shows."""
    classes = search.record["classes"]
    known = f", the classes {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}"
    holds = f"features of {search.num_rows:,} images{known if classes else ''} and row numbers"
    holds += ", and the encoder's weights" if place.files else ""
    shows = f"It shows no image of the data, but holds {holds}; --publish_images true adds them."
    if images:
        shows = f"It shows every image of the data as a thumbnail, and holds {holds}."
    title, about = describe(search)
    shows += f' Whoever sees it reads there: "{title}. {about}"'
    if place.private:
        shows += (
            f" {place.name} is private: give the Space a token that may read it, as the secret "
            "HF_TOKEN in its settings."
        )
    return shows
