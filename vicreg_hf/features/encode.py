"""Encoding a batch of images: how it is sent to a device, normalised and computed with.

Shapes: B images of a batch, N images, C channels, S side in pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vicreg_hf.features.encoders import Encoder
from vicreg_hf.runtime.transfer import on_device

Autocast = Callable[[], AbstractContextManager[object]]
"""The context of a forward pass. It is entered anew for each, as torch keeps weights of lower
precision until it is left."""


@torch.inference_mode()
def encode(
    module: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    device: torch.device,
    autocast: Autocast = nullcontext,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """Encode one batch.

    Args:
        module: gives (B, F) for (B, C, S, S), on the device and in eval mode.
        images: (B, C, S, S), uint8, or float32 that is normalised already.
        mean: per channel, of the encoder's preprocessing; a tensor on the device is not copied.
        std: likewise.
        memory_format: of the images that the module is given.

    Returns:
        (B, F) float32 on the device.
    """
    x = on_device(images, device)
    if x.dtype == torch.uint8:
        x = normalise_images(x, mean, std)
    with autocast():
        return module(x.to(memory_format=memory_format)).float()


def normalise_images(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """uint8 images (B, C, S, S) as the float32 that an encoder was trained on."""
    shape = (1, -1, 1, 1)
    centre, width = (
        on_device(torch.as_tensor(values), images.device).view(shape) for values in (mean, std)
    )
    return (images.float() / 255 - centre) / width


def encode_with(
    encoder: Encoder, images: Tensor, device: torch.device, autocast: Autocast = nullcontext
) -> Tensor:
    """Encode a batch of the encoder's own evaluation views; (B, F) float32 on the device.

    Raises:
        ValueError: an encoder that does not pool.
    """
    features = encode(
        encoder.module, images, mean=encoder.mean, std=encoder.std, device=device,
        autocast=autocast, memory_format=torch.channels_last,
    )  # fmt: skip
    if features.ndim != 2:
        raise ValueError(
            "the encoder must pool to shape (batch, features), got "
            f"{tuple(features.shape)}; remove global_pool from its model_args."
        )
    return features


def check_finite_features(features: Tensor) -> Tensor:
    """The features (N, F) themselves. A GPU is waited for, so this is not for every batch.

    Raises:
        ValueError: some are not finite.
    """
    if not bool(features.isfinite().all()):
        raise ValueError(
            "the encoder must give finite features, and some are not; compute in float32, without "
            "--bf16 and --mixed_precision, or choose another checkpoint."
        )
    return features


@contextmanager
def encoding_precision(accelerator: Accelerator, bf16: bool) -> Iterator[None]:
    """Compute in bfloat16 if wanted, or in the accelerator's mixed precision if it has one."""
    kind = accelerator.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=bf16), accelerator.autocast():
        yield


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Encode all batches, with the encoder in eval mode for as long as it takes.

    Args:
        encoder: gives (B, F) for (B, C, S, S); a bare timm module with num_classes=0, say.
        batches: uint8 tensors (B, C, S, S).
        mean: per channel, of the encoder's preprocessing; likewise std.

    Returns:
        (N, F) float32 on the device.
    """
    place = torch.device(device)
    centre, width = (torch.tensor(values, device=place) for values in (mean, std))
    training = encoder.training
    encoder.eval()
    try:
        features = [
            encode(encoder, images, mean=centre, std=width, device=place, autocast=autocast)
            for images in batches
        ]
    finally:
        encoder.train(training)
    return torch.cat(features)
