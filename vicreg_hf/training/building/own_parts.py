"""Parts of one's own that a run takes in place of those that its settings describe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vicreg_hf.data.opening.dataset import DEMO
from vicreg_hf.data.opening.items import GIVEN, name_given
from vicreg_hf.hub.source import terms_of_record
from vicreg_hf.loss.own import LOSS, Loss, own_terms
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.settings.pretraining import DEFAULT_ARCHITECTURE, PretrainingArguments

COEFFICIENTS = ("sim_coeff", "std_coeff", "cov_coeff", "variance_reduction")
LOCAL_SETTINGS = ("local_weight", "local_matches", "local_view_matches")
RESERVED = {
    "step", "epoch", "lr", "grad_norm", "views_per_second", "embedding_std", "effective_rank",
    "alignment", "uniformity", "bad_images", "embedding_std_prime", "effective_rank_prime",
    "weights", "rows", "gradients", "largest_gradients",
    "probe_loss", "knn", "knn_images", "knn_pixels", "probe",
    *(
        f"{sample}{name}" for sample in ("sample_", "sample_embedding_")
        for name in ("effective_rank", "alignment", "uniformity")
    ),
}  # fmt: skip
"""Names in metrics.jsonl that no scalar of a loss may bear."""


@dataclass(frozen=True)
class OwnParts:
    """What `pretrain` was given besides settings; None is the part that settings describe."""

    model: VICRegModel | None = None
    train_dataset: Any = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, VICRegModel):
            raise ValueError(
                f"model must be a VICRegModel, got {type(self.model).__name__}; "
                "VICRegModel.from_timm and VICRegModel.from_pretrained make one."
            )
        if self.loss is None:
            return
        if self.model is not None and self.model.local_expander is not None:
            raise ValueError(
                "loss must be left out with a model that has a local loss, or local_weight of its "
                f"configuration be 0, got {self.model.config.local_weight}."
            )
        if not isinstance(self.loss, Callable) or isinstance(self.loss, type):
            raise ValueError(
                "loss must be a function of two tensors (rows, dimensions) or a module, got "
                f"{self.loss!r}."
            )
        if isinstance(self.loss, nn.Module) and any(
            p.requires_grad for p in self.loss.parameters()
        ):
            raise ValueError(
                "loss must have no parameters to train, as a run saves those of its model alone, "
                f"got {type(self.loss).__name__} with some."
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What a card says of a model that was given, in the place of `init_from`."""
        if self.model is None:
            return {}
        config = self.model.config
        base, licence = terms_of_record(config.pretrained_cfg, config.architecture)
        facts = {"name": None, "sha256": None, "base_model": base, "license": licence}
        return {"init_from": facts}

    def fill_in(self, args: PretrainingArguments) -> PretrainingArguments:
        """The settings as the parts determine them.

        Raises:
            ValueError: a setting contradicts a part.
        """
        if self.loss is not None:
            _refuse_coefficients(args)
        if self.model is not None:
            args = settings_of_model(args, self.model)
        if self.train_dataset is not None:
            args = settings_of_dataset(args, self.train_dataset)
        return args


def _refuse_coefficients(args: PretrainingArguments) -> None:
    own = COEFFICIENTS + LOCAL_SETTINGS
    given = [name for name in own if getattr(args, name) != getattr(type(args), name)]
    if given:
        raise ValueError(
            f"{', '.join(given)} must be left out with loss, which weights its own terms, got "
            f"{', '.join(f'{name}={getattr(args, name)}' for name in given)}."
        )


def settings_of_model(args: PretrainingArguments, model: VICRegModel) -> PretrainingArguments:
    """The settings that a model answers; those left at their defaults count as not given."""
    default, config = type(args), model.config
    if model.prime is not None or args.prime_modality is not None:
        raise ValueError(
            "model must have one branch, and second branches come from settings alone, got "
            + ("a model of two." if model.prime is not None else
               f"prime_modality={args.prime_modality}; leave out either.")
        )  # fmt: skip
    if args.pretrained or args.init_from is not None:
        raise ValueError(
            "pretrained and init_from must be left out with model, which has its own weights, got "
            f"pretrained={args.pretrained} and init_from={args.init_from}."
        )
    if kinds := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise ValueError(
            f"model must hold float32 weights, got {', '.join(map(str, kinds))}; call "
            "model.float(), and choose the precision with accelerate's --mixed_precision."
        )
    found = {
        "architecture": config.architecture, "model_args": config.model_args or None,
        "expander_dims": "-".join(map(str, config.expander_dims)),
    }  # fmt: skip
    if model.local_expander is not None:
        found["local_expander_dims"] = "-".join(map(str, config.local_expander_dims))
    elif args.local_weight:
        raise ValueError(
            "local_weight must be 0 with a model that has no local expander, got "
            f"{args.local_weight}; make one with VICRegConfig(local_weight={args.local_weight})."
        )
    for name, own in found.items():
        asked = getattr(args, name)
        same = asked.partition(".")[0] == own if name == "architecture" else (asked or None) == own
        usual = DEFAULT_ARCHITECTURE if name == "architecture" else getattr(default, name)
        if not same and asked != usual:
            raise ValueError(
                f"{name} must be left out with model, or be the model's, {own}, got {asked}."
            )
    for name in COEFFICIENTS + LOCAL_SETTINGS:
        own, asked, usual = (getattr(each, name) for each in (config, args, default))
        if usual not in (own, asked) and own != asked:
            raise ValueError(f"{name} must be the model's, {own}, or left out, got {asked}.")
        found[name] = own if asked == usual else asked
    if args.image_size is None and (config.pretrained_cfg or {}).get("fixed_input_size"):
        found["image_size"] = config.pretrained_cfg["input_size"][-1]  # pyright: ignore
    return replace(args, **found)


def settings_of_dataset(args: PretrainingArguments, dataset: Any) -> PretrainingArguments:
    """The settings with the name of a data set that is given in Python."""
    name = name_given(dataset)
    if args.dataset_name not in (DEMO, name) or args.dataset_config_name or args.streaming:
        raise ValueError(
            "dataset_name, dataset_config_name and streaming must be left out with train_dataset, "
            f"got dataset_name={args.dataset_name}, dataset_config_name={args.dataset_config_name} "
            f"and streaming={args.streaming}."
        )
    directory = args.output_dir
    if directory == f"runs/{DEMO}":  # the name of data that are not these
        directory = f"runs/{name.removeprefix(GIVEN)}"
    return replace(args, dataset_name=name, output_dir=directory)


def try_loss(
    loss: Loss | None, model: VICRegModel, accelerator: Accelerator, rows: int
) -> tuple[str, ...] | None:
    """Call a loss of one's own once, in all processes, before any training.

    Args:
        rows: embeddings that a process has of each view.

    Returns:
        The names of its scalars, "loss" first; None where there is no such loss.

    Raises:
        ValueError: it returns no scalars, no gradient, or names that a run uses.
    """
    if loss is None:
        return None
    shape, device = (rows, model.config.expander_dims[-1]), accelerator.device
    generator = torch.Generator().manual_seed(accelerator.process_index)
    views = [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(2)]
    trial = loss
    if isinstance(loss, nn.Module) and list(loss.buffers()):
        trial = copy.deepcopy(loss)  # its statistics must not be those of noise
    found = own_terms(trial, views)
    if not found[LOSS].requires_grad:
        raise ValueError("loss must have a gradient by the embeddings, got a tensor without one.")
    found[LOSS].backward()
    if used := RESERVED & found.keys():
        raise ValueError(
            f"loss must name its scalars otherwise than a run's own, got {', '.join(sorted(used))}."
        )
    return (LOSS, *(name for name in found if name != LOSS))
