"""Feature maps in the report: their principal components as colours, and matches between two views.

Shapes: n images, C channels, H x W pixels, S side in pixels, h x w positions, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from vicreg_hf.evaluation.report.gallery import encoded, thumbnail
from vicreg_hf.features.maps import colours_of_maps, picture_of_matches

SIDE = 240
"""Pixels of a picture's longer side, at most."""


@dataclass(frozen=True, eq=False)
class Maps:
    """Some images, an encoder's maps of them, and two random views of each."""

    images: Tensor
    """(n, C, H, W) uint8."""
    maps: Tensor
    """(n, h, w, F)."""
    views: tuple[Tensor, Tensor]
    """(n, C, S, S) uint8 each."""
    maps_of_views: tuple[Tensor, Tensor]
    """(n, h', w', F) each."""


def pictures_of_maps(shown: Maps) -> list[dict[str, Any]]:
    """The contents of the page's section: of each image its picture, its map, and its matches."""
    height, width = shown.images.shape[2:]
    found = []
    for place, colours in enumerate(colours_of_maps(shown.maps, (height, width))):
        first, second = (views[place] for views in shown.views)
        own = [maps[place] for maps in shown.maps_of_views]
        matches = picture_of_matches(first, second, own[0], own[1])
        matches.thumbnail((2 * SIDE, SIDE), Image.Resampling.LANCZOS)
        found.append(
            {
                "image": thumbnail(shown.images[place], SIDE), "map": thumbnail(colours, SIDE),
                "matches": encoded(matches, "jpeg", quality=90),
            }
        )  # fmt: skip
    return found
