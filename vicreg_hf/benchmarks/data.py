"""The making of views against the authors' pipeline and others, and the bottleneck of a run.

Shapes: B images, S side of a view.
"""

from __future__ import annotations

import dataclasses
import io
import random
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision import transforms as tv
from torchvision.transforms import v2

from vicreg_hf.benchmarks.measuring import median_seconds, surroundings, table
from vicreg_hf.data.batches import channels_last
from vicreg_hf.data.columns.image_files import decode_image
from vicreg_hf.data.pairs import PairedSplit
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.runtime.machine import available_cores
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.training.run import Run
from vicreg_hf.training.setup import setup
from vicreg_hf.training.step import take_gradients
from vicreg_hf.views.presets import PRESETS, ViewRecipe
from vicreg_hf.views.two_views import TwoViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
Runs = dict[str, Callable[[], object]]


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


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class _Blur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class _Solarize:
    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image)


def pil_view(recipe: ViewRecipe, side: int) -> tv.Compose:
    """The authors' pipeline for one view: PIL operations, drawn by torch's and Python's own."""
    jitter = tv.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    crop = tv.RandomResizedCrop(
        side, recipe.scale, recipe.ratio, interpolation=tv.InterpolationMode.BICUBIC
    )
    return tv.Compose(
        [
            crop,
            tv.RandomHorizontalFlip(recipe.flip),
            tv.RandomApply([jitter], recipe.jitter),
            tv.RandomGrayscale(recipe.grayscale),
            tv.RandomApply([_Blur()], recipe.blur),
            tv.RandomApply([_Solarize()], recipe.solarize),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )


def torchvision_view(recipe: ViewRecipe, side: int) -> v2.Compose:
    """The same with torchvision's v2 on uint8 tensors."""
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    crop = v2.RandomResizedCrop(
        side, recipe.scale, recipe.ratio, interpolation=v2.InterpolationMode.BICUBIC
    )
    return v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(recipe.flip),
            v2.RandomApply([jitter], recipe.jitter),
            v2.RandomGrayscale(recipe.grayscale),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], recipe.blur),
            v2.RandomSolarize(128, recipe.solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
        ]
    )


def kornia_view(recipe: ViewRecipe) -> nn.Module | None:
    """The same, after the crop, with kornia on a float batch; None where it is not installed."""
    try:
        from kornia import augmentation as ka  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    operations = [
        ka.RandomHorizontalFlip(p=recipe.flip),
        ka.ColorJitter(*strengths, p=recipe.jitter),
        ka.RandomGrayscale(p=recipe.grayscale),
        ka.RandomGaussianBlur((13, 13), (0.1, 2.0), p=recipe.blur),
        ka.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=recipe.solarize),
        ka.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ]
    return nn.Sequential(*operations)


def against_others() -> str:
    """Tables for large and for small images, on one core."""
    torch.set_num_threads(1)
    parts = [
        surroundings(CPU),
        "500 x 375 JPEGs, views of 224 pixels, preset authors:",
        large_images(),
        "32 x 32 in memory, views of 32 pixels, preset cifar:",
        small_images(),
    ]
    return "\n\n".join(parts)


def large_images(count: int = 32, side: int = 224) -> str:
    """A table for JPEGs of 500 x 375 pixels, on one core: milliseconds an image, both views."""
    recipes = PRESETS["authors"][:2]
    encoded = [jpeg(image) for image in photographs(count, 500, 375)]
    theirs = [pil_view(recipe, side) for recipe in recipes]
    modern = [torchvision_view(recipe, side) for recipe in recipes]
    indices = np.arange(count)
    plain, fused = TwoViews(side, recipes), TwoViews(side, recipes, compile=True)
    decoded = [decode_image(data) for data in encoded]
    crops = plain.crop(decoded, indices)

    def authors() -> None:
        for data in encoded:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            _ = [view(image) for view in theirs]

    def modern_views() -> None:
        for image in decoded:
            _ = [view(image) for view in modern]

    runs: Runs = {
        "authors": authors,
        "decode": lambda: [decode_image(data) for data in encoded],
        "crop": lambda: plain.crop(decoded, indices),
        "colour": lambda: plain.transform_crops(crops, indices),
        "colour, compiled": lambda: fused.transform_crops(crops, indices),
        "torchvision v2, crop and colour": modern_views,
    }
    kornia = [kornia_view(recipe) for recipe in recipes]
    if kornia[0] is not None and kornia[1] is not None:
        modules = kornia[0], kornia[1]
        compiled = [torch.compile(module) for module in modules]
        runs["kornia, colour"] = lambda: [m(x / 255) for m, x in zip(modules, crops, strict=True)]
        runs["kornia, colour, compiled"] = lambda: [
            m(x / 255) for m, x in zip(compiled, crops, strict=True)
        ]
    took = _milliseconds(runs, count)
    workers = took["decode"] + took["crop"]
    sums = {
        "the workers' share: decode and crop": workers,
        "everything": workers + took["colour"],
        "everything, compiled": workers + took["colour, compiled"],
    }
    return _ratios(took | sums)


def small_images(count: int = 512, side: int = 32) -> str:
    """A table for images in memory of the views' own side, in one process on one core."""
    recipes = PRESETS["cifar"][:2]
    pictures = photographs(count, side, side)
    images = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2)
    images = images.contiguous()
    theirs = [pil_view(recipe, side) for recipe in recipes]
    indices = np.arange(count)
    plain, fused = TwoViews(side, recipes), TwoViews(side, recipes, compile=True)
    runs: Runs = {
        "authors": lambda: [[view(picture) for view in theirs] for picture in pictures],
        "everything": lambda: plain(images, indices),
        "everything, compiled": lambda: fused(images, indices),
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
    """
    with tempfile.TemporaryDirectory() as folder:
        run = setup(dataclasses.replace(args, output_dir=folder, resume="never"))
        return f"{surroundings(run.accelerator.device)}\n\n{_stages(run)}"


def _pinned(part: Tensor, device: torch.device) -> Tensor:
    """As the run sends it."""
    return part.pin_memory() if device.type == "cuda" else part


def _stages(run: Run) -> str:
    views, device = run.views, run.accelerator.device
    images, batches = run.inputs.images, run.batches
    epoch, rows = batches.batch(0)
    times: Runs = {}
    if isinstance(images, PairedSplit):
        raise ValueError("the stages of pairs are not measured; leave out --prime_modality.")
    workers = max(1, min(run.args.num_workers or 0, available_cores()))
    if isinstance(images, Tensor):
        chosen = _pinned(images[torch.from_numpy(rows)], device)
        on_device = chosen.to(device)
        times["transfer"] = lambda: chosen.to(device, copy=True)
        times["crop and colour on the device"] = lambda: views(on_device, rows, epoch)
        made = views(on_device, rows, epoch)
    else:
        if isinstance(images, ImageSplit):
            decode = lambda: images.read_or_replace(rows.tolist())[0]  # noqa: E731
        else:
            decode = lambda: images.first(len(rows))  # noqa: E731
        decoded = decode()
        rows = rows[: len(decoded)]
        crops = [_pinned(part, device) for part in views.crop(decoded, rows, epoch)]
        moved = tuple(part.to(device) for part in crops)
        times[f"read and decode, {workers} workers"] = decode
        times[f"crop, {workers} workers"] = lambda: views.crop(decoded, rows, epoch)
        times["transfer"] = lambda: [part.to(device, copy=True) for part in crops]
        times["colour on the device"] = lambda: views.transform_crops(moved, rows, epoch)
        made = views.transform_crops(moved, rows, epoch)
    made = tuple(map(channels_last, made))

    def step() -> None:
        take_gradients(run, made)
        run.optimizer.step()
        run.optimizer.zero_grad()

    times["model"] = step
    rates = {
        name: len(made) * len(rows) / seconds * (workers if "workers" in name else 1)
        for name, seconds in median_seconds(times, device).items()
    }
    lines = [[name, f"{rate:.0f}"] for name, rate in rates.items()]
    slowest = min(rates, key=lambda name: rates[name])
    return f"{table(['stage', 'views per second'], lines)}\n\nThe bottleneck is: {slowest}."
