"""Features of a set of images under any encoder.

Shapes: N images, B a batch, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vicreg_hf.transfer import on_device

Encoder = Callable[[Tensor], Tensor]


def normalise_images(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """uint8 images (B, 3, S, S) as the float32 the encoder was trained on.

    Args:
        mean: per channel; of a tensor on the images' device nothing has to be copied there.
        std: likewise.
    """
    shape = (1, -1, 1, 1)
    centre = torch.as_tensor(mean, device=images.device).view(shape)
    width = torch.as_tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - centre) / width


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    batches: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Pooled features of every image, with the encoder in eval mode for as long as it takes.

    Args:
        encoder: gives (B, F) for (B, 3, S, S); a bare timm module with num_classes=0, say.
        batches: uint8 tensors (B, 3, S, S).
        mean: per channel, of the encoder's preprocessing; likewise std.
        autocast: the context in which the encoder sees a batch, entered anew for each: torch keeps
            weights of lower precision until it is left.

    Returns:
        (N, F) float32 on the device.
    """
    training = encoder.training
    encoder.eval()
    centre, width = (torch.tensor(values, device=device) for values in (mean, std))
    features = []
    try:
        for images in batches:
            x = normalise_images(on_device(images, torch.device(device)), centre, width)
            with autocast():
                features.append(encoder(x).float())
    finally:
        encoder.train(training)
    return torch.cat(features)


def pixel_features(batches: Iterable[Tensor], *, device: torch.device | str = "cpu") -> Tensor:
    """The images themselves as features (N, 3 S S): what an encoder has to beat."""
    return torch.cat([images.to(device).flatten(1).float() / 255 - 0.5 for images in batches])
