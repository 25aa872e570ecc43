"""Views, and what they are compared by."""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_hf.views.presets import ViewRecipe

NOTHING = ViewRecipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grey_levels(views: tuple[Tensor, Tensor]) -> Tensor:
    """Undo the normalisation; both views as (2, B, 3, S, S)."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (torch.stack(views) * std + mean) * 255
