"""How a classifier is trained on an encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vicreg_hf.views.presets import ViewRecipe


@dataclass(frozen=True)
class FinetuneSettings:
    """How a classifier is trained; by default as the authors' README does linear evaluation.

    Raises:
        ValueError: a setting that cannot be.

    Source: vicreg@4e12602, evaluate.py and README.
    """

    epochs: int = 100
    """Passes over the training rows; after each, learning rates fall along a cosine to zero."""
    batch_size: int = 256
    """Images per step over all processes; of fewer training rows, as many as there are."""
    lr_head: float = 0.02
    """Of the linear classifier in the first epoch; not scaled by the batch. evaluate.py has 0.3."""
    lr_backbone: float = 0.0
    """Of the encoder in the first epoch; 0 freezes it, batch statistics and dropout included."""
    weight_decay: float = 1e-6
    """Added to the gradient as weight_decay * p, of every parameter that is trained."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop as a fraction of the image's."""
    flip: float = 0.5
    """Probability of mirroring left to right."""
    seed: int = 0
    """Of the classifier's first weights, the order of images, their crops, and dropout."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 < self.lr_head < math.inf:
            raise ValueError(f"lr_head must be a positive number, got {self.lr_head}.")
        for name in ("lr_backbone", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0, got {getattr(self, name)}.")
        _ = self.recipe

    @property
    def frozen(self) -> bool:
        """Whether the encoder is left as it is."""
        return self.lr_backbone == 0

    @property
    def recipe(self) -> ViewRecipe:
        """Random resized crop and flip, and nothing else."""
        return ViewRecipe(scale=self.scale, flip=self.flip, jitter=0.0, grayscale=0.0)

    def learning_rates(self, epoch: int) -> tuple[float, float]:
        """Of classifier and encoder in an epoch, from 0; torch's CosineAnnealingLR by epochs."""
        share = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.lr_head * share, self.lr_backbone * share


LINEAR = FinetuneSettings()
ONE_PERCENT = FinetuneSettings(epochs=20, lr_backbone=0.03, lr_head=0.08, weight_decay=0.0)
"""The authors' for 1 % of ImageNet's labels."""
TEN_PERCENT = FinetuneSettings(epochs=20, lr_backbone=0.01, lr_head=0.1, weight_decay=0.0)
"""The authors' for 10 %."""
