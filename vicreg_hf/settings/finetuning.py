"""How a classifier is trained on an encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vicreg_hf.settings.base import Count, NotNegative, Positive, Settings
from vicreg_hf.views.presets import ViewRecipe


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """How a classifier is trained; by default as the authors' README does linear evaluation.

    Source: vicreg@4e12602, evaluate.py and README.
    """

    epochs: Count = 100
    """Passes over the training rows; learning rates fall along a cosine to zero."""
    batch_size: Count = 256
    """Images per step over all processes, at most as many as there are training rows."""
    lr_head: Positive = 0.02
    """Learning rate of the classifier in the first epoch, whatever the batch size."""
    lr_backbone: NotNegative = 0.0
    """Learning rate of the encoder in the first epoch; 0 freezes all of it."""
    weight_decay: NotNegative = 1e-6
    """Added to the gradient of every trained parameter p as weight_decay * p."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest area of the random crop, as fractions of the image's."""
    flip: float = 0.5
    """Probability of mirroring an image left to right."""
    seed: int = 0
    """Seed of the classifier's first weights, the order of images, their crops, and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.recipe  # which checks scale and flip

    @property
    def frozen(self) -> bool:
        """Whether the encoder is left as it is."""
        return self.lr_backbone == 0

    @property
    def recipe(self) -> ViewRecipe:
        """Random resized crop and flip, and nothing else."""
        return ViewRecipe(scale=self.scale, flip=self.flip, jitter=0.0, grayscale=0.0)

    def learning_rates(self, epoch: int) -> tuple[float, float]:
        """Rates of classifier and encoder in an epoch, from 0, as torch's CosineAnnealingLR."""
        share = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.lr_head * share, self.lr_backbone * share


LINEAR = FinetuneSettings()
ONE_PERCENT = FinetuneSettings(epochs=20, lr_backbone=0.03, lr_head=0.08, weight_decay=0.0)
"""The authors' settings for 1 % of ImageNet's labels."""
TEN_PERCENT = FinetuneSettings(epochs=20, lr_backbone=0.01, lr_head=0.1, weight_decay=0.0)
"""The authors' settings for 10 % of ImageNet's labels."""
