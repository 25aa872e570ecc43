"""Extracting the features of a data set against the encoder's bare forward pass."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

from vicreg_hf.benchmarks.data import data_set, jpeg, photographs
from vicreg_hf.benchmarks.measuring import median_seconds, surroundings, table
from vicreg_hf.data.splits import image_split
from vicreg_hf.features.encoders import timm_encoder
from vicreg_hf.features.parts import Part
from vicreg_hf.features.writing import write_parts
from vicreg_hf.runtime.machine import default_num_workers


def extraction(
    architecture: str, device: str, *, num_images: int, batch_size: int, side: int | None
) -> str:
    """Images per second of both, decoding JPEGs and writing parquet included in the one.

    Args:
        side: of the images in pixels, square; None takes 500 x 375.
    """
    place = torch.device(device)
    accelerator = Accelerator(cpu=place.type == "cpu")
    encoder = timm.create_model(architecture, num_classes=0).eval().to(device)
    encoder = encoder.to(memory_format=torch.channels_last)
    registry: Any = encoder.pretrained_cfg
    own = {} if side is None else {"input_size": (3, side, side), "crop_pct": 1.0}
    opened = timm_encoder(encoder, architecture, pretrained_cfg={**registry, **own})
    config = opened.data_config
    size = (500, 375) if side is None else (side, side)
    pictures = [jpeg(image) for image in photographs(64, *size)]
    made = data_set([pictures[k % len(pictures)] for k in range(num_images)])
    splits = {"train": image_split({"train": made}, "train", dataset_name="photographs")}
    pixels = torch.randn(batch_size, *config["input_size"], device=device)
    pixels = pixels.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        part = Part("train", range(num_images), Path(folder) / "features" / "train.parquet")

        @torch.inference_mode()
        def bare() -> None:
            for start in range(0, num_images, batch_size):
                encoder(pixels[: num_images - start])

        def whole() -> None:
            shutil.rmtree(part.file.parent, ignore_errors=True)
            write_parts(
                opened, splits, [part], accelerator, batch_size=batch_size,
                num_workers=default_num_workers(1),
            )  # fmt: skip

        seconds = median_seconds({"bare": bare, "whole": whole}, place, seconds=20, max_repeats=5)
    rates = {name: num_images / each for name, each in seconds.items()}
    header = ["encoder", "images", "forward alone, images/s", "extraction, images/s", "share"]
    row = [
        f"{architecture} at {config['input_size'][-1]} px", str(num_images),
        f"{rates['bare']:.0f}", f"{rates['whole']:.0f}",
        f"{100 * rates['whole'] / rates['bare']:.0f} %",
    ]  # fmt: skip
    return f"{surroundings(place)}\n{table(header, [row])}"
