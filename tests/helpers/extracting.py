"""Photographs in folders, an encoder of them, and their extraction."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
from families import trained
from pictures import photographs
from torchvision.transforms.v2 import functional as tv

from vicreg_hf.features.extract import extract_dataset
from vicreg_hf.settings.extraction import ExtractionArguments

SETTINGS: dict[str, Any] = {"rows_per_file": 10, "batch_size": 5, "num_workers": 0}
SIZES = [(40, 60), (64, 64), (33, 90), (120, 50)]


def write_folder(root: Path) -> Path:
    """Class folders of 36 photographs of several sizes, one of them gray, and one HTML page."""
    for k in range(36):
        (image,) = photographs(1, *SIZES[k % 4])
        picture = tv.to_pil_image((image.int() + 3 * k).clamp(0, 255).byte())
        path = root / "train" / ("cat" if k % 3 else "dog") / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (picture.convert("L") if k == 7 else picture).save(path)
    (root / "train" / "dog" / "99.png").write_bytes(b"<html>404</html>")
    for kind in ("cat", "dog"):
        (root / "test" / kind).mkdir(parents=True)
        shutil.copy(root / "train" / "dog" / "00.png", root / "test" / kind / "copy.png")
    return root


def write_encoder(directory: Path) -> Path:
    model = trained()
    assert model.config.pretrained_cfg is not None
    model.config.pretrained_cfg |= {"input_size": [3, 48, 48], "crop_pct": 0.9}
    model.save_pretrained(directory, include_expander=False)
    return directory


def extract(encoder: Path, data: Path, output: Path, **settings: Any) -> Path:
    given = SETTINGS | settings
    return extract_dataset(ExtractionArguments(str(encoder), str(data), str(output), **given))


def load(directory: Path, tmp_path: Path) -> Any:
    return datasets.load_dataset(str(directory), cache_dir=str(tmp_path / "cache"))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "data").iterdir()}
