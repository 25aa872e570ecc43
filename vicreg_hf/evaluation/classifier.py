"""An encoder and a linear classifier of its features, as one module.

Shapes: B images, C channels, S side in pixels, F features, K classes.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vicreg_hf.runtime.randomness import Stream, derive_seed

HEAD_STD = 0.01
"""Standard deviation of the classifier's first weights; its first biases are zero."""


class Classifier(nn.Module):
    """A linear classifier of an encoder's features, in float32 whatever the autocast.

    Args:
        encoder: gives (B, F) for (B, C, S, S).
        head: gives (B, K).
        frozen: keep the encoder in eval mode, and give it no gradients.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, *, frozen: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.frozen = encoder.requires_grad_(not frozen), head, frozen
        self.train()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.encoder(x)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))


def create_head(num_features: int, num_classes: int, *, seed: int) -> nn.Linear:
    """A linear classifier with the authors' first weights, a function of its size and the seed."""
    # torch's own initialisation would advance the caller's generator
    head = nn.Linear(num_features, num_classes, device="meta").to_empty(device="cpu")
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, epoch=0, index=0, stream=Stream.MODEL))
    nn.init.normal_(head.weight, std=HEAD_STD, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def freeze_unused(model: Classifier, images: Tensor) -> None:
    """Encode some images, and freeze the parameters that their features do not depend on.

    DistributedDataParallel awaits a gradient of every parameter that is not frozen.

    Raises:
        ValueError: features of another shape than (B, F).
    """
    with torch.set_grad_enabled(not model.frozen):
        features = model.encoder.eval()(images)
    model.train()
    expected = (len(images), model.head.in_features)
    if not isinstance(features, Tensor) or features.shape != expected:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the encoder must give features of shape {expected} for images of shape "
            f"{tuple(images.shape)}, got {got}."
        )
    if features.requires_grad:
        parameters = list(model.encoder.parameters())
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
