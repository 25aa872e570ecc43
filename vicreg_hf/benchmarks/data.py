"""The making of views against the authors' pipeline and others, and the bottleneck of a run.

Shapes: B images, S side of a view.
"""

from __future__ import annotations

import dataclasses
import io
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision import transforms as tv
from torchvision.transforms import v2

from vicreg_hf.benchmarks.measuring import median_seconds, surroundings, table
from vicreg_hf.data.batches import channels_last
from vicreg_hf.data.columns.image_files import decode_image
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.memory import SMALL_IMAGE
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.runtime.machine import available_cores
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients
from vicreg_hf.views.presets import PRESETS, ViewRecipe
from vicreg_hf.views.two_views import TwoViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
Runs = dict[str, Callable[[], object]]
Pictures = Sequence[Image.Image | bytes]
MADE = "made"
"""The name of a data set of images that are made."""
PICTURES = 256
"""Different images at most; larger data sets repeat them."""
WITHOUT_END = 10**6
"""Steps of a run that is never finished."""


def photographs(count: int, width: int, height: int) -> list[Image.Image]:
    """Pieces of scikit-learn's two photographs, some of them mirrored."""
    bundle: Any = load_sample_images()
    pieces = []
    for k in range(count):
        image = Image.fromarray(bundle.images[k % 2])
        left, top = 7 * k % 100, 5 * k % 50
        image = image.crop((left, top, left + 500, top + 375)).resize((width, height))
        pieces.append(ImageOps.mirror(image) if k % 4 > 1 else image)
    return pieces


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "JPEG", quality=90, **({"exif": exif} if orientation > 1 else {}))
    return buffer.getvalue()


@contextmanager
def made_images(args: PretrainingArguments) -> Iterator[tuple[PretrainingArguments, Pictures]]:
    """Settings of a run without end on images that are made for it, and these images.

    They have the views' own side where that is small; else they are JPEGs of 500 x 375.
    """
    side, count = args.image_size or 224, max(args.batch_size, PICTURES)
    if side <= SMALL_IMAGE:
        different: Any = photographs(PICTURES, side, side)
    else:
        different = [jpeg(image) for image in photographs(PICTURES, 500, 375)]
    pictures = [different[k % PICTURES] for k in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        data_set(pictures).save_to_disk(f"{folder}/images")
        yield dataclasses.replace(
            args, dataset_name=f"{folder}/images", image_size=side, max_steps=WITHOUT_END,
            output_dir=f"{folder}/run", resume="never", online_probe=False,
        ), pictures  # fmt: skip


def opened(picture: Image.Image | bytes) -> Image.Image:
    """A picture, or the file of one, in RGB."""
    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    return image.convert("RGB")


def data_set(pictures: Pictures) -> datasets.Dataset:
    """Pictures, or the files of them, as a column of images."""
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": list(pictures)}, features=features)


def pil_view(recipe: ViewRecipe, side: int) -> tv.Compose:
    """The authors' pipeline for one view: PIL operations, drawn by torch's and Python's own."""
    last = [tv.ToTensor(), tv.Normalize(MEAN, STD)]
    solarize = tv.RandomApply([ImageOps.solarize], recipe.solarize)
    return tv.Compose([*_operations(tv, recipe, side, _blur), solarize, *last])


def torchvision_view(recipe: ViewRecipe, side: int) -> v2.Compose:
    """The same with torchvision's v2 on uint8 tensors."""
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]
    blur, solarize = v2.GaussianBlur(13, (0.1, 2.0)), v2.RandomSolarize(128, recipe.solarize)
    return v2.Compose([*_operations(v2, recipe, side, blur), solarize, *last])


def _operations(library: Any, recipe: ViewRecipe, side: int, blur: Callable[..., Any]) -> list[Any]:
    """Crop to blur, by the classes of torchvision's first or second version."""
    jitter = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    bicubic = tv.InterpolationMode.BICUBIC
    return [
        library.RandomResizedCrop(side, recipe.scale, recipe.ratio, interpolation=bicubic),
        library.RandomHorizontalFlip(recipe.flip),
        library.RandomApply([library.ColorJitter(*jitter)], recipe.jitter),
        library.RandomGrayscale(recipe.grayscale),
        library.RandomApply([blur], recipe.blur),
    ]


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Views:
    """The views of an image by one of these pipelines; loading workers get it pickled."""

    def __init__(self, view: Callable[..., Any], recipes: Sequence[ViewRecipe], side: int) -> None:
        self.views = [view(recipe, side) for recipe in recipes]

    def __call__(self, image: Any) -> list[Any]:
        return [view(image) for view in self.views]


def kornia_runs(recipes: Sequence[ViewRecipe], crops: Sequence[Tensor]) -> Runs:
    """The same, after the crop, with kornia on float batches; none where it is not installed."""
    try:
        from kornia import augmentation as ka  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    views = [
        nn.Sequential(
            ka.RandomHorizontalFlip(p=r.flip),
            ka.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue, p=r.jitter),
            ka.RandomGrayscale(p=r.grayscale),
            ka.RandomGaussianBlur((13, 13), (0.1, 2.0), p=r.blur),
            ka.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=r.solarize),
            ka.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )
        for r in recipes
    ]
    compiled = [torch.compile(view) for view in views]
    return {
        "kornia, colour": lambda: [v(x / 255) for v, x in zip(views, crops, strict=True)],
        "kornia, colour, compiled": lambda: [
            v(x / 255) for v, x in zip(compiled, crops, strict=True)
        ],
    }


def views(flags: Sequence[str]) -> str:
    """The bottleneck of a run with flags of pretrain.py, on made images if asked for `MADE`.

    Without flags, tables for large and for small images, on one core.
    """
    if flags:
        args = parse_arguments(flags)
        if args.dataset_name != MADE:
            return bottleneck(args)
        with made_images(args) as (made, _):
            return bottleneck(made)
    torch.set_num_threads(1)
    parts = [
        surroundings(CPU),
        "500 x 375 JPEGs, views of 224 pixels, preset authors:",
        large_images(),
        "4000 x 3000 JPEGs with grain, as telephones take them, likewise:",
        telephone_images(),
        "32 x 32 in memory, views of 32 pixels, preset cifar:",
        small_images(),
    ]
    return "\n\n".join(parts)


def large_images(count: int = 32, side: int = 224) -> str:
    """A table for JPEGs of 500 x 375 pixels, on one core: milliseconds an image, both views."""
    recipes = PRESETS["authors"][:2]
    encoded = [jpeg(image) for image in photographs(count, 500, 375)]
    theirs, modern = Views(pil_view, recipes, side), Views(torchvision_view, recipes, side)
    indices = np.arange(count)
    plain, fused = TwoViews(side, recipes), TwoViews(side, recipes, compile=True)
    decoded = [decode_image(data) for data in encoded]
    crops = plain.crop(decoded, indices)
    runs: Runs = {
        "authors": lambda: [theirs(opened(data)) for data in encoded],
        "decode": lambda: [decode_image(data) for data in encoded],
        "crop": lambda: plain.crop(decoded, indices),
        "colour": lambda: plain.transform_crops(crops, indices),
        "colour, compiled": lambda: fused.transform_crops(crops, indices),
        "torchvision v2, crop and colour": lambda: [modern(image) for image in decoded],
    }
    runs |= kornia_runs(recipes, crops)
    took = _milliseconds(runs, count)
    workers = took["decode"] + took["crop"]
    sums = {
        "the workers' share: decode and crop": workers,
        "everything": workers + took["colour"],
        "everything, compiled": workers + took["colour, compiled"],
    }
    return _ratios(took | sums)


def telephone_images(count: int = 4, side: int = 224) -> str:
    """A table for JPEGs of 12 megapixels, some turned by EXIF: decoding and crops of both views."""
    recipes, indices = PRESETS["authors"][:2], np.arange(count)
    theirs, ours = Views(pil_view, recipes, side), TwoViews(side, recipes)
    grain = Image.effect_noise((4000, 3000), 16).convert("RGB")
    pictures = [ImageChops.add(p, grain, 1, -128) for p in photographs(count, 4000, 3000)]

    def crops(files: list[bytes], column: ImageColumn, *, reduced: bool) -> object:
        cut = [ours.reduction(k) if reduced else None for k in range(count)]
        cells = [{"bytes": data} for data in files]
        images = [column.decode(*each) for each in zip(cells, cut, strict=True)]
        return ours.crop(images, indices)

    column: ImageColumn = ImageColumn("image", datasets.Image())
    runs: Runs = {}
    for orientation in (1, 6):
        files = [jpeg(picture, orientation) for picture in pictures]
        if orientation == 1:
            runs["authors"] = partial(lambda files: [theirs(opened(f)) for f in files], files)
        for reduced in (False, True):
            name = f"EXIF orientation {orientation}, {'reduced' if reduced else 'exact'}"
            runs[name] = partial(crops, files, column, reduced=reduced)
    return _ratios(_milliseconds(runs, count))


def small_images(count: int = 512, side: int = 32) -> str:
    """A table for images in memory of the views' own side, in one process on one core."""
    recipes = PRESETS["cifar"][:2]
    pictures = photographs(count, side, side)
    images = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)
    images = images.contiguous()
    theirs = Views(pil_view, recipes, side)
    indices = np.arange(count)
    plain, fused = TwoViews(side, recipes), TwoViews(side, recipes, compile=True)
    runs: Runs = {
        "authors": lambda: [theirs(picture) for picture in pictures],
        "everything": lambda: plain(images, indices, 0),
        "everything, compiled": lambda: fused(images, indices, 0),
    }
    return _ratios(_milliseconds(runs, count))


def _milliseconds(runs: Runs, count: int) -> dict[str, float]:
    for run in runs.values():  # compiling is not what is measured
        run()
        run()
    return {name: 1000 * s / count for name, s in median_seconds(runs, CPU, seconds=15).items()}


def _ratios(took: dict[str, float]) -> str:
    authors = took["authors"]
    lines = [[name, f"{ms:.3f}", f"{authors / ms:.2f}"] for name, ms in took.items()]
    return table(["", "ms an image", "authors / this"], lines)


def bottleneck(args: PretrainingArguments) -> str:
    """A table of the views per second that each stage of a run would make alone, the least last.

    Workers are counted as many times as there are, or as there are cores for them.

    Raises:
        ValueError: settings that cannot be, or samples in pairs.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = setup(dataclasses.replace(args, output_dir=folder, resume="never"))
        return f"{surroundings(run.accelerator.device)}\n\n{_stages(run)}"


def _stages(run: Run) -> str:
    views, device = run.views, run.accelerator.device
    images, (epoch, rows) = run.inputs.images, run.batches.batch(0)
    if isinstance(images, PairedSplit):
        raise ValueError("the stages of pairs are not measured; leave out --prime_modality.")
    workers = max(1, min(run.args.num_workers or 0, available_cores()))
    pinned = device.type == "cuda"  # as the run sends them
    times: Runs = {}
    if isinstance(images, Tensor):
        chosen = images[torch.from_numpy(rows)]
        chosen = chosen.pin_memory() if pinned else chosen
        on_device = chosen.to(device)
        colour, stage = (lambda: views(on_device, rows, epoch)), "crop and colour on the device"
        times["transfer"] = lambda: chosen.to(device, copy=True)
    else:
        reductions = partial(views.reduction, epoch=epoch) if run.reduced else None
        decode = partial(run.inputs.first_images, rows.tolist(), reductions)
        decoded = decode()
        rows = rows[: len(decoded)]
        crops = views.crop(decoded, rows, epoch)
        crops = [part.pin_memory() if pinned else part for part in crops]
        moved = tuple(part.to(device) for part in crops)
        colour, stage = (lambda: views.transform_crops(moved, rows, epoch)), "colour on the device"
        times[f"read and decode, {workers} workers"] = decode
        times[f"crop, {workers} workers"] = lambda: views.crop(decoded, rows, epoch)
        times["transfer"] = lambda: [part.to(device, copy=True) for part in crops]
    made = tuple(map(channels_last, colour()))

    def step() -> None:
        take_gradients(run, made)
        run.optimizer.step()
        run.optimizer.zero_grad()

    torch.backends.cudnn.benchmark = pinned  # as in training
    step()  # compiles and tunes
    times |= {stage: colour, "model": step}
    rates = {
        name: len(made) * len(rows) / seconds * (workers if "workers" in name else 1)
        for name, seconds in median_seconds(times, device).items()
    }
    lines = [[name, f"{rate:.0f}"] for name, rate in rates.items()]
    slowest = min(rates, key=lambda name: rates[name])
    return f"{table(['stage', 'views per second'], lines)}\n\nThe bottleneck is: {slowest}."
