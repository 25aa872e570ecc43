"""Files that users drop into a page: images of unusual kinds, and what is no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

USABLE = {
    "cmyk.jpg": "Its CMYK colours were converted to RGB.",
    "moving.gif": "Its first frame of 2 is searched for.",
    "deep.png": "Its values of more than 8 bits were scaled to 8.",
    "turned.jpg": "",
}
"""Names of images that are found neighbours for, and the sentence that is said about each."""
UNUSABLE = ("page.jpg", "cut.jpg", "bomb.png", "empty.png")
"""Names of files that are refused with one sentence."""


def write_uploads(folder: Path, photo: Image.Image) -> Path:
    """Write those files, all but the deep and the unusable ones from a photograph."""
    folder.mkdir()
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.save(folder / "moving.gif", save_all=True, append_images=[photo.rotate(180)])
    levels = np.asarray(photo.convert("L"), np.uint16) * 200
    Image.fromarray(levels).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.rotate(90, expand=True).save(folder / "turned.jpg", exif=turned)
    (folder / "page.jpg").write_bytes(b"<html>404</html>")
    (folder / "cut.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:-400])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "empty.png").write_bytes(b"")
    return folder
