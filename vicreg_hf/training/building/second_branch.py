"""The inputs of both branches: views of the images, and another column for the second branch.

Shapes: B samples per process.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import datasets
import timm
from torch import Tensor

from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.data.columns.base import Column
from vicreg_hf.data.columns.images import ImageColumn
from vicreg_hf.data.columns.second_column import open_second_column
from vicreg_hf.data.columns.spectrograms import SpectrogramColumn
from vicreg_hf.data.pairs import PairedSplit, SecondInput
from vicreg_hf.models.tokenizers import default_max_length
from vicreg_hf.settings.pretraining import PretrainingArguments
from vicreg_hf.views.presets import find_recipes, multi_crop_recipes
from vicreg_hf.views.random_views import RandomViews


def takes_waveforms(args: PretrainingArguments) -> bool:
    """Whether the second branch takes sounds as waveforms, its model not being one of timm."""
    name = str(args.prime_architecture).partition(".")[0]
    return args.prime_modality == "audio" and not timm.is_model(name)


def open_run_column(args: PretrainingArguments, table: datasets.Dataset, channels: int) -> Column:
    """The column that the second branch of a run reads; errors as of `open_second_column`.

    Args:
        channels: channels of the first branch's images.
    """
    own: Any = args.prime_model_args
    sound: dict[str, Any] = {"sampling_rate": args.sampling_rate, "seconds": args.audio_seconds}
    preparations: dict[str | None, dict[str, Any]] = {"audio": sound}
    if args.prime_modality == "text":
        length = args.prime_max_length or default_max_length(str(args.prime_architecture))
        preparations["text"] = {"max_length": length}
    like_first = args.prime_architecture is None and own is None
    return open_second_column(
        table, str(args.prime_modality), args.prime_column,
        preparations.get(args.prime_modality, {}), waveforms=takes_waveforms(args),
        tokenizer=args.prime_tokenizer or args.prime_architecture,
        channels=channels if like_first else (own or {}).get("in_chans", 3),
    )  # fmt: skip


def create_views(
    args: PretrainingArguments,
    config: VICRegConfig,
    pairs: PairedSplit | None,
    *,
    compiled: bool = False,
) -> tuple[RandomViews, SecondInput | None]:
    """The views of a run's images, and the inputs that the second branch makes of its column.

    Args:
        args: the settings as `open_training_data` completes them.
        config: configuration of the model, whose encoders decide sides and normalisation.
        compiled: whether operations on images are fused.
    """
    first, second = config.pretrained_cfg, (config.prime or {}).get("pretrained_cfg")
    assert first is not None
    views = _image_views(
        args, pairs, first, second or first, compiled=compiled, places=args.local_weight > 0
    )
    if pairs is None:
        return views, None
    if not isinstance(pairs.column, (ImageColumn, SpectrogramColumn)):
        column: Any = pairs.column
        return views, SecondInput(partial(column.batch, seed=args.seed))
    assert second is not None
    sound = isinstance(pairs.column, SpectrogramColumn)
    recipe = find_recipes("audio" if sound else args.augmentation or "").x_prime
    other: RandomViews[tuple[Tensor]] = RandomViews(
        second["input_size"][-1], (recipe,), mean=second["mean"], std=second["std"],
        seed=args.seed, in_chans=second["input_size"][0], compile=compiled, numbers=(1,),
    )  # fmt: skip
    return views, SecondInput(other.crop, other.transform_crops)


def unnormalised_views(args: PretrainingArguments, pairs: PairedSplit | None) -> RandomViews:
    """The views of a run's images with levels from 0 to 1, for people to look at."""
    channels = args.in_chans
    like = {"mean": [0.0] * channels, "std": [1.0] * channels}
    side = args.prime_image_size or args.image_size
    return _image_views(args, pairs, like, like | {"input_size": (channels, side, side)})


def _image_views(
    args: PretrainingArguments,
    pairs: PairedSplit | None,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    *,
    compiled: bool = False,
    places: bool = False,
) -> RandomViews:
    """The views of the images; in pairs all but the second view, which another column gives.

    Args:
        first: pretrained_cfg of the encoder of the first view.
        second: pretrained_cfg of the encoder of the second view.
        places: whether to say where in their images they lie.
    """
    assert args.augmentation is not None
    recipes = multi_crop_recipes(
        args.augmentation, num_global_views=args.num_global_views,
        num_local_views=args.num_local_views,
    )  # fmt: skip
    sides: list[Any] = [args.image_size] * args.num_global_views
    sides[1] = second["input_size"][-1]
    sides += [args.local_image_size] * args.num_local_views
    cfgs = [second if view == 1 else first for view in range(len(recipes))]
    kept = [view for view in range(len(recipes)) if pairs is None or view != 1]
    return RandomViews(
        [sides[view] for view in kept], tuple(recipes[view] for view in kept),
        mean=[cfgs[view]["mean"] for view in kept], std=[cfgs[view]["std"] for view in kept],
        seed=args.seed, in_chans=args.in_chans, compile=compiled, numbers=kept, places=places,
    )  # fmt: skip
