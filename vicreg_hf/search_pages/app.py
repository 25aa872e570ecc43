"""A page that finds the images of a data set which are most like one that is dropped into it.

`vicreg-hf search --serve` shows this page. Copied into a Space of the Hub, beside the files that
`vicreg-hf publish --space` writes, it runs by itself: it imports nothing of vicreg_hf.

Shapes: N rows of a file, F features.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image, ImageOps

SETTINGS, CSS, TEMPLATE = "search.json", "cases.css", "cases.html.jinja"
FEATURES, THUMBNAILS = "features", "thumbnails"
"""Folders of a Space, in which files of the same name belong together."""
with suppress(ImportError):  # PIL's plugin for what telephones write, where it is installed
    from pi_heif import register_heif_opener

    register_heif_opener()
Image.init()
FORMATS = tuple(
    name
    for name in (
        "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "DIB", "ICO", "QOI",
        "PSD", "PCX", "SGI", "DDS", "TGA", "HEIF",
    )
    if name in Image.OPEN
)  # fmt: skip
MAX_PIXELS = 89_000_000
"""Largest size that the header of an upload may claim."""
MAX_UPLOAD = "100mb"
THUMBNAIL = 192
"""Pixels of the longer side of a thumbnail, at most."""
COLOURS = """<style>.found { --raised: var(--background-fill-secondary); --ink: currentColor;
--line: var(--border-color-primary); --muted: var(--body-text-color-subdued); --accent: #0072b2; }
.dark .found { --accent: #56b4e9; } .found li { list-style: none; } .found .muted { opacity: .8; }
"""
"""The colours of gradio's theme, by the names that the style of reports has for them."""


class UnusableError(ValueError):
    """A file that cannot be searched for; the sentence says why."""


@dataclass(frozen=True)
class Picture:
    """A small picture."""

    uri: str
    """A data URL."""
    width: int
    height: int


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    similarity: float
    """Cosine similarity to the query, from -1 to 1."""
    split: str
    row: int
    name: str
    """The name of its file, or its split and row."""
    label: str | None
    """Its class, if it has one."""
    picture: Any = None
    """A `Picture`, or another object with its attributes; None where there is none to show."""


@dataclass(frozen=True)
class Case:
    """A query, and the images that are most like it, the nearest first."""

    name: str
    picture: Any
    hits: Sequence[Hit]
    note: str = ""
    """What was done to its pixels, if anything."""

    @property
    def classes(self) -> list[tuple[str, int]]:
        """The classes of the images found and their numbers, the most frequent first."""
        return Counter(hit.label for hit in self.hits if hit.label is not None).most_common()


def environment(*folders: Path) -> Environment:
    """Templates of this folder and of others; whatever they show is escaped."""
    return Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders]), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def note_on(path: str) -> str:
    """A sentence on what is done to an image beyond reading it; empty where that is nothing."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as image, open(path, "rb") as file:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                return f"Its first frame of {frames} is searched for."
            if image.mode == "CMYK":
                return "Its CMYK colours were converted to RGB."
            png = file.read(25)
            if image.mode.startswith(("I", "F")) or (image.format == "PNG" and png[24] == 16):
                return "Its values of more than 8 bits were scaled to 8."
    return ""


def page(find: Callable[[str], Case], *, title: str, about: str, css: str) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        find: gives the images that are most like that of a file, or raises a ValueError whose
            sentence is shown.
        title: plain text, as about is.
        css: the style of `cases.html.jinja`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which gradio reads when it is imported
    import gradio as gr  # pyright: ignore[reportMissingImports]

    template = environment().get_template(TEMPLATE)

    def answer(path: str) -> tuple[str, None]:
        """HTML, and no file, so that the box is empty for the next one."""
        try:
            case = find(path)
        except ValueError as error:
            return f'<p class="refused" role="alert">{html.escape(str(error))}</p>', None
        shown = template.render(cases=[case])
        return f'{COLOURS}{css}</style><div class="found">{shown}</div>', None

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.HTML(f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>")
        dropped = gr.File(label="Drop an image here", type="filepath", elem_id="query")
        found = gr.HTML(elem_id="answer")
        dropped.upload(answer, dropped, [found, dropped], api_name="find")
    return blocks


def launch(blocks: Any, **where: Any) -> str:
    """Show the page without blocking; its address on this machine."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = blocks.launch(
        theme=theme, share=False, ssr_mode=False, show_error=True, quiet=True,
        prevent_thread_lock=True, max_file_size=MAX_UPLOAD, footer_links=[], **where,
    )  # fmt: skip
    return address


# Only a Space uses the rest of this file; `search --serve` reads and encodes images otherwise.


def read_image(path: str, channels: int, limits: Sequence[float] | None) -> Image.Image:
    """Read the first frame of an image, upright, as RGB or gray of 8 bits.

    Args:
        channels: 3 or 1.
        limits: the values that become black and white in images of more than 8 bits; by default the
            least and the largest in the image.

    Raises:
        UnusableError: no image, a damaged one, or one of more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{width} x {height} pixels")
                image.load()
                upright = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise UnusableError(
            f"This file cannot be used: more than {MAX_PIXELS:,} pixels are not read ({error})."
        ) from error
    except Exception as error:  # decoders raise whatever their parsing meets
        reason = "it is no image of a known format" if isinstance(error, OSError) else error
        raise UnusableError(f"This file cannot be used: {reason}, or it is damaged.") from error
    if upright.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(upright, np.float64))
        low, high = limits or (values.min(), values.max())
        levels = ((values - low) / max(high - low, 1e-12)).clip(0, 1) * 255 + 0.5
        upright = Image.fromarray(levels.astype(np.uint8))
    return upright.convert("L" if channels == 1 else "RGB")


class StockEncoder:
    """An encoder as transformers loads it without further code."""

    def __init__(
        self, model: str, *, revision: str | None, trained_pooler: bool, channels: int
    ) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self._torch, self._pooler = torch, trained_pooler
        self.channels = channels
        self.processor: Any = AutoImageProcessor.from_pretrained(model, revision=revision)
        loaded: Any = AutoModel.from_pretrained(model, revision=revision, dtype=torch.float32)
        self.model = loaded.eval()

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """The features (F,) of an image, prepared as for evaluation."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        with self._torch.inference_mode():
            return self._pooled(pixels).float().flatten().numpy()

    def _pooled(self, pixels: Any) -> Any:
        if hasattr(self.model, "get_image_features"):  # a model of images and texts
            found = self.model.get_image_features(pixel_values=pixels)
            return getattr(found, "pooler_output", found)
        output = self.model(pixel_values=pixels)
        if self._pooler:
            return output.pooler_output
        last = output.last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.mean((2, 3))


class Space:
    """The files of a Space, and the search in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text("utf-8"))
        own = folder / self.settings["model"]
        self.encoder = StockEncoder(
            str(own) if own.is_dir() else self.settings["model"],
            revision=self.settings["revision"], channels=self.settings["channels"],
            trained_pooler=self.settings["trained_pooler"],
        )  # fmt: skip

    def find(self, path: str) -> Case:
        """The images that are most like that of a file; see `read_image` for errors."""
        image = read_image(path, self.encoder.channels, self.settings["value_range"])
        query = self.encoder(image)
        best: list[tuple[float, Path, int]] = []
        for file in sorted((self.folder / FEATURES).glob("*.safetensors")):
            best = nlargest(self.settings["k"], [*best, *self._similar(file, query)])
        hits = [self._hit(*one) for one in best]
        shown = image.copy()
        shown.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        shown.save(buffer, "png")
        return Case("Your image", _picture(buffer.getvalue(), *shown.size), hits, note_on(path))

    def _similar(self, file: Path, query: NDArray[np.float32]) -> Iterator[tuple[float, Path, int]]:
        """The nearest rows of a file, by cosine similarity."""
        from safetensors.numpy import load_file

        features = load_file(file)["features"].astype(np.float32)
        lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
        similarity = (features @ query / np.maximum(lengths, 1e-12)).clip(-1, 1)
        for place in np.argsort(-similarity, kind="stable")[: self.settings["k"]].tolist():
            yield float(similarity[place]), file, place

    def _hit(self, similarity: float, file: Path, place: int) -> Hit:
        from safetensors import safe_open

        split, classes = file.name.rsplit("-", 3)[0], self.settings["classes"]
        with safe_open(file, "np") as held:
            row = int(held.get_slice("row")[place])
            label = int(held.get_slice("label")[place])
        picture = None
        if (thumbnails := self.folder / THUMBNAILS / file.name).is_file():
            with safe_open(thumbnails, "np") as held:
                start, end = held.get_slice("bounds")[place : place + 2].tolist()
                if end > start:
                    size = held.get_slice("sizes")[place].tolist()
                    picture = _picture(held.get_slice("files")[start:end].tobytes(), *size)
        known = classes[label] if 0 <= label < len(classes) else str(label)
        name = f"{split}, row {row}"
        return Hit(similarity, split, row, name, None if label < 0 else known, picture)


def _picture(data: bytes, width: int, height: int) -> Picture:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, int(width), int(height))


def main() -> None:
    """Show the page of the Space in whose folder this file lies."""
    folder = Path(__file__).parent
    space = Space(folder)
    blocks = page(
        space.find, title=space.settings["title"], about=space.settings["about"],
        css=(folder / CSS).read_text("utf-8"),
    )  # fmt: skip
    print(f"Running on {launch(blocks)}", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
