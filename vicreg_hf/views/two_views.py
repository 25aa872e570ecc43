"""Two random views of each image in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vicreg_hf.models.timm_models import encoder_pretrained_cfg
from vicreg_hf.views.presets import Recipes, ViewRecipe, find_recipes
from vicreg_hf.views.random_views import PerChannel, RandomViews, _are_recipes


class TwoViews(RandomViews[tuple[Tensor, Tensor]]):
    """Make the two views of VICReg from a batch of images.

    Args:
        image_size: S, the side of a view in pixels; one for both, or one for each.
        preset: one of `PRESETS`, a YAML file or its content as `find_recipes` takes it, what that
            gives, or the recipes of the first and the second view.
        mean: as for `RandomViews`; likewise the others.

    Raises:
        ValueError: unknown preset, or as for `RandomViews`.

    Example:
        >>> make = TwoViews(image_size=32, preset="cifar")
        >>> x, x_prime = make(images, indices, epoch)  # other views in every epoch
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        preset: str | Mapping[str, Any] | Recipes | tuple[ViewRecipe, ViewRecipe] = "authors",
        *,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        seed: int = 0,
        in_chans: int = 3,
        compile: bool = False,  # noqa: A002 - torch's word
    ) -> None:
        recipes = preset if isinstance(preset, tuple) else find_recipes(preset, name="preset")
        if isinstance(recipes, Recipes):
            recipes = recipes.x, recipes.x_prime
        if len(recipes) != 2:
            raise ValueError(f"preset must have the recipes of 2 views, got {len(recipes)}.")
        if not _are_recipes(recipes):
            raise ValueError(f"preset must be a name or a ViewRecipe for each view, got {preset}.")
        super().__init__(
            image_size, recipes, mean=mean, std=std, seed=seed, in_chans=in_chans, compile=compile
        )

    @classmethod
    def for_model(
        cls, model: Any, preset: Any = "authors", *, image_size: int | None = None,
        seed: int = 0, compile: bool = False,  # noqa: A002 - torch's word
    ) -> TwoViews:  # fmt: skip
        """Views normalised as the published encoder asks of its images.

        Args:
            model: whose `config.pretrained_cfg` says how, and is published with it.
            preset: as for `TwoViews`; likewise seed and compile.
            image_size: S, which the published encoder asks for then; None takes the model's own.

        Raises:
            ValueError: a size that the backbone was not built for, or as for `TwoViews`.
        """
        config = model.config
        built = config.model_args or {}
        assert config.pretrained_cfg is not None
        cfg = encoder_pretrained_cfg(config.pretrained_cfg, built, image_size)
        channels, size, _ = cfg["input_size"]
        if image_size not in (None, size):
            raise ValueError(
                f"image_size must be the backbone's img_size, {size}, got {image_size}; build the "
                "model with model_args={'img_size': " + f"{image_size}" + "}."
            )
        views = cls(
            size, preset, mean=cfg["mean"], std=cfg["std"], seed=seed, in_chans=channels,
            compile=compile,
        )  # fmt: skip
        config.pretrained_cfg = cfg
        return views
