"""Two random views of each image in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from vicreg_hf.views.presets import Recipes, ViewRecipe, find_recipes
from vicreg_hf.views.random_views import PerChannel, RandomViews, are_recipes

Preset = str | Mapping[str, Any] | Recipes | tuple[ViewRecipe, ViewRecipe]


class Configured(Protocol):
    """A model whose configuration says which images it takes, as a `VICRegModel` has it."""

    config: Any


class TwoViews(RandomViews[tuple[Tensor, Tensor]]):
    """Make the two views of VICReg from a batch of images.

    Args:
        image_size: S, the side of a view in pixels; one for both, or one for each.
        preset: one of `PRESETS`, a YAML file or its content as `find_recipes` takes it, what that
            gives, or the recipes of the first and the second view.
        mean: as for `RandomViews`; likewise the others. With `places` there are three tensors.

    Raises:
        ValueError: unknown preset, or as for `RandomViews`.

    Example:
        >>> make = TwoViews(image_size=32, preset="cifar")
        >>> x, x_prime = make(images, indices, epoch)  # other views in every epoch
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        preset: Preset = "authors",
        *,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
        seed: int = 0,
        in_chans: int = 3,
        compile: bool = False,  # noqa: A002 - torch's word
        places: bool = False,
    ) -> None:
        recipes = preset if isinstance(preset, tuple) else find_recipes(preset, name="preset")
        if isinstance(recipes, Recipes):
            recipes = recipes.x, recipes.x_prime
        if len(recipes) != 2 or not are_recipes(recipes):
            raise ValueError(
                f"preset must be a name or a ViewRecipe for each of 2 views, got {preset!r}."
            )
        super().__init__(
            image_size, recipes, mean=mean, std=std, seed=seed, in_chans=in_chans, compile=compile,
            places=places,
        )  # fmt: skip

    @classmethod
    def for_model(
        cls,
        model: Configured,
        preset: Preset = "authors",
        *,
        image_size: int | None = None,
        seed: int = 0,
        compile: bool = False,  # noqa: A002 - torch's word
        places: bool | None = None,
    ) -> TwoViews:
        """Views of the size and normalisation that the published encoder asks of its images.

        Args:
            model: its `config.pretrained_cfg` has both; `model.set_image_size` changes the size.
            preset: as for `TwoViews`; likewise seed and compile.
            image_size: S, for a check that the model is set to it.
            places: as for `RandomViews`; by default where the model has a local loss, which takes
                them.

        Raises:
            ValueError: the model is set to another size, or as for `TwoViews`.
        """
        cfg = model.config.pretrained_cfg
        channels, _, size = cfg["input_size"]
        if image_size not in (None, size):
            raise ValueError(
                f"image_size must be the size that the model asks for, {size}, got {image_size}; "
                f"call model.set_image_size({image_size}) first, so that the published encoder "
                "asks for it too."
            )
        has_local_loss = getattr(model.config, "local_weight", 0) > 0
        return cls(
            size, preset, mean=cfg["mean"], std=cfg["std"], seed=seed, in_chans=channels,
            compile=compile, places=has_local_loss if places is None else places,
        )  # fmt: skip
