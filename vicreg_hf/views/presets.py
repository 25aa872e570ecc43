"""Recipes: the distributions that views are drawn from, and the presets of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vicreg_hf.runtime.checks import is_number


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of one view; probabilities lie in [0, 1].

    Raises:
        ValueError: a probability, range or strength that cannot be.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip: float = 0.5
    """Probability of mirroring left to right."""
    jitter: float = 0.8
    """Probability of the colour jitter as a whole."""
    brightness: float = 0.4
    """Factor drawn from [1 - brightness, 1 + brightness]; likewise the next two."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Shift drawn from [-hue, hue], in turns of the colour circle."""
    grayscale: float = 0.2
    blur: float = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels of the view."""
    solarize: float = 0.0
    """Probability of inverting every level of 128 and above."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "blur_sigma"):
            ends: Any = getattr(self, name)
            pair = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))
            if not pair or not 0 < ends[0] <= ends[1] < math.inf:
                raise ValueError(
                    f"{name} must be two positive numbers, the lesser first, got {ends!r}."
                )
            object.__setattr__(self, name, (float(ends[0]), float(ends[1])))
        for name, most in _MOST.items():
            value: Any = getattr(self, name)
            if not is_number(value) or not 0 <= value <= most or value == math.inf:
                limits = f"between 0 and {most}" if most < math.inf else "at least 0"
                raise ValueError(f"{name} must be a number {limits}, got {value!r}.")


_MOST = {
    "flip": 1, "jitter": 1, "grayscale": 1, "blur": 1, "solarize": 1, "hue": 0.5,
    "brightness": math.inf, "contrast": math.inf, "saturation": math.inf,
}  # fmt: skip


class Recipes(NamedTuple):
    """The recipes of a run's views, as a preset or a file has them."""

    x: ViewRecipe
    """For the first view, and every other global view after it."""
    x_prime: ViewRecipe
    """For the second view, and every other global view after it."""
    local: ViewRecipe
    """For local views, if there are any."""


LOCAL_SCALE = (0.05, 0.14)
"""SwAV's, beside global crops of (0.14, 1)."""


def local_recipe(x: ViewRecipe) -> ViewRecipe:
    """The default for local views: smaller crops, with all else as in the first view.

    Their scale is SwAV's, (0.05, 0.14), enlarged in proportion where global crops start above 0.14,
    so that local crops end where global ones start, and small images leave them pixels to show.

    Source: SwAV, Caron et al. 2020, arXiv:2006.09882 (224 pixels globally, 96 locally).
    """
    low, high = LOCAL_SCALE
    start = max(high, x.scale[0])
    return replace(x, scale=(round(low * start / high, 4), start))


def _preset(x: ViewRecipe, x_prime: ViewRecipe) -> Recipes:
    return Recipes(x, x_prime, local_recipe(x))


_AUTHORS = ViewRecipe()
_PAPER = replace(_AUTHORS, blur=0.5, solarize=0.1)
_CIFAR = ViewRecipe(scale=(0.2, 1.0), solarize=0.1)
_TINY = ViewRecipe(scale=(0.4, 1.0), jitter=0.6, grayscale=0.1)
_DEMO = ViewRecipe(scale=(0.3, 1.0), flip=0.0, grayscale=0.0)
_AUDIO = ViewRecipe(
    scale=(0.6, 1.0), ratio=(0.6, 8.0), flip=0.0, saturation=0.0, hue=0.0, grayscale=0.0
)

PRESETS: Mapping[str, Recipes] = {
    # vicreg@4e12602, augmentations.py: the two views differ.
    "authors": _preset(replace(_AUTHORS, blur=1.0), replace(_AUTHORS, blur=0.1, solarize=0.2)),
    # The paper's text, appendix C.1: both views alike.
    "paper": _preset(_PAPER, _PAPER),
    # solo-learn's recipe for CIFAR: larger crops, no blur.
    "cifar": _preset(_CIFAR, _CIFAR),
    # Gentler than cifar, for small images and backbones of under a million parameters.
    "tiny": _preset(_TINY, _TINY),
    # Handwritten digits: a mirrored digit is not a digit.
    "demo": _preset(_DEMO, _DEMO),
    # Log-mel spectrograms as gray images, frequency down and time across, after BYOL-A (Niizumi et
    # al. 2021, arXiv:2103.06695): a crop resized shifts and stretches pitch and time, which most
    # sounds survive down to 0.6 of either. Brightness and contrast stand for gain and dynamics. A
    # mirrored sound runs backwards, a solarised one has its silence loud, and there is no colour.
    # The ratio, in pixels, reaches from a square cut to 0.6 of its time to ten seconds (1000 x 128)
    # uncut: of a spectrogram wider than its ratio allows, every view would be the same middle.
    "audio": _preset(_AUDIO, _AUDIO),
}


def find_recipes(preset: str | Mapping[str, Any], *, name: str = "augmentation") -> Recipes:
    """The recipes of a preset, a YAML file, or the content of such a file.

    The file names a preset to start from (`preset`, by default authors) and what differs from it:
    fields of `ViewRecipe` for all views, and under `x`, `x_prime` and `local` for one kind. Local
    views start from what x has become, with the scale of `local_recipe`.

    Args:
        name: the caller's name for `preset`, for errors.

    Raises:
        ValueError: no such preset or file, a field that does not exist, a value that cannot be.
    """
    if isinstance(preset, str) and preset in PRESETS:
        return PRESETS[preset]
    content: Any = preset
    if isinstance(preset, str) and Path(preset).is_file():
        try:
            content = yaml.safe_load(Path(preset).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} must be valid YAML, {preset} is not: {error}") from error
    elif not isinstance(preset, Mapping):
        remedy = "; give a recipe for each view, as (recipe, recipe)"
        raise ValueError(
            f"{name} must be one of {', '.join(PRESETS)}, a YAML file or its content, got "
            f"{preset!r}{remedy if isinstance(preset, ViewRecipe) else ''}."
        )
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must map fields to values, got {content!r}.")
    common = dict(content)
    base = common.pop("preset", "authors")
    own = {view: common.pop(view, None) or {} for view in Recipes._fields}
    if not isinstance(base, str) or base not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {base!r}.")
    x = _changed(name, PRESETS[base].x, common, own["x"])
    x_prime = _changed(name, PRESETS[base].x_prime, common, own["x_prime"])
    return Recipes(x, x_prime, _changed(name, local_recipe(x), own["local"]))


def multi_crop_recipes(
    preset: str | Mapping[str, Any] | Recipes,
    *,
    num_global_views: int = 2,
    num_local_views: int = 0,
) -> tuple[ViewRecipe, ...]:
    """A recipe for each view: first the global ones, x and x_prime by turns, then the local ones.

    Args:
        preset: as `find_recipes` takes it, or recipes.

    Raises:
        ValueError: as `find_recipes`; no global view, or fewer than no local ones.

    Example:
        >>> recipes = multi_crop_recipes("authors", num_local_views=6)
        >>> views = RandomViews([224] * 2 + [96] * 6, recipes)
    """
    if num_global_views < 1:
        raise ValueError(f"num_global_views must be at least 1, got {num_global_views}.")
    if num_local_views < 0:
        raise ValueError(f"num_local_views must be at least 0, got {num_local_views}.")
    recipes = preset if isinstance(preset, Recipes) else find_recipes(preset, name="preset")
    by_turns = (recipes[view % 2] for view in range(num_global_views))
    return (*by_turns, *[recipes.local] * num_local_views)


def _changed(name: str, recipe: ViewRecipe, *changes: Any) -> ViewRecipe:
    known = {f.name for f in fields(ViewRecipe)}
    for change in changes:
        if not isinstance(change, dict):
            raise ValueError(f"x, x_prime and local must map fields to values, got {change!r}.")
        unknown = {str(key) for key in change} - known
        if unknown:
            raise ValueError(
                f"{name} must hold preset, x, x_prime, local and fields of a view "
                f"({', '.join(sorted(known))}), got {', '.join(sorted(unknown))}."
            )
        recipe = replace(recipe, **change)
    return recipe


def describe(recipes: Recipes) -> dict[str, Any]:
    """Recipes as `find_recipes` takes them, without the default recipe of local views.

    So a run without local views is described as before there were any.
    """
    plain = {
        view: {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(recipe).items()}
        for view, recipe in recipes._asdict().items()
    }
    if recipes.local == local_recipe(recipes.x):
        del plain["local"]
    return plain
