"""The classes of pixels in the report: overlap of each class, and the worst and best images.

Shapes: H x W pixels, K classes.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vicreg_hf.evaluation.measurements import Segmented
from vicreg_hf.evaluation.report.classes import few_of
from vicreg_hf.evaluation.report.gallery import Inline, encoded, thumbnail

SIDE = 240
"""Pixels of a picture's longer side, at most."""
GOLDEN = 0.618034
VOID_COLOUR = (0, 0, 0)


def segmentation(found: Segmented) -> dict[str, Any]:
    """The contents of the page's section: bars of the classes, the worst first, and pictures."""
    bars = [
        {"name": name, "images": one["images"], "share": one["iou"], "low": one["low"],
         "high": one["high"]}
        for name, one in found.classes.items() if one["iou"] is not None
    ]  # fmt: skip
    bars.sort(key=lambda bar: bar["share"])
    shown, left_out = few_of(bars)
    colours = class_colours(len(found.names))
    worst = (len(found.cases) + 1) // 2
    cases = [
        {
            "kind": "worst" if place < worst else "best", "row": case.row, "score": case.score,
            "image": thumbnail(case.image, SIDE), "truth": _drawn(case.truth, colours),
            "predicted": _drawn(case.predicted, colours),
        }
        for place, case in enumerate(found.cases)
    ]  # fmt: skip
    seen = {int(k) for case in found.cases for mask in (case.truth, case.predicted)
            for k in mask.unique()}  # fmt: skip
    legend = [
        {"name": "void" if k < 0 else found.names[k],
         "colour": "#%02x%02x%02x" % (VOID_COLOUR if k < 0 else tuple(colours[k]))}
        for k in sorted(seen, key=lambda k: (k < 0, k))
    ]  # fmt: skip
    return {
        "bars": shown, "left_out": left_out, "untested": len(found.classes) - len(bars),
        "cases": cases, "legend": legend,
    }  # fmt: skip


def class_colours(number: int) -> NDArray[np.uint8]:
    """(K, 3) colours of classes; neighbours in the order differ in hue and in brightness."""
    each = [
        colorsys.hsv_to_rgb(k * GOLDEN % 1, (0.85, 0.5, 0.7)[k % 3], (0.75, 0.95, 0.55)[k // 2 % 3])
        for k in range(number)
    ]
    return (255 * np.array(each).reshape(-1, 3)).round().astype(np.uint8)


def _drawn(mask: Tensor, colours: NDArray[np.uint8]) -> Inline:
    """Classes (H, W) as colours; -1 is void."""
    table = np.concatenate([colours, np.array([VOID_COLOUR], np.uint8)])
    picture = Image.fromarray(table[mask.numpy()])
    picture.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    return encoded(picture, "png", optimize=True)
