"""VICRegModel: any timm backbone and the expander, as a transformers model.

Shapes: B images per process, F representation, D embedding, S side in pixels.
"""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils.generic import ModelOutput

from vicreg_hf.configuration_vicreg import INDEX_FILE, VICRegConfig, encoder_pretrained_cfg
from vicreg_hf.expander import expander
from vicreg_hf.loss import vicreg_loss

ENCODER_FILE = "model.safetensors"
EXPANDER_FILE = "expander.safetensors"


@dataclass
class VICRegOutput(ModelOutput):
    """What `VICRegModel` returns; fields that were not computed are None."""

    loss: Tensor | None = None
    """Scalar, over all processes; present when both views were given."""
    invariance: Tensor | None = None
    """Scalar, detached and not weighted; likewise the next two."""
    variance: Tensor | None = None
    covariance: Tensor | None = None
    embeddings: tuple[Tensor, Tensor] | None = None
    """Two (B, D) tensors: z of the first views and of the second."""
    last_hidden_state: Tensor | None = None
    """The backbone's feature map or tokens of the first views, as timm lays them out."""
    pooler_output: Tensor | None = None
    """(B, F): the representations of the first views."""


def check_architecture(name: str) -> str:
    """Return a timm architecture's name without its tag, or say which names come close.

    Raises:
        ValueError: timm has no such model.
    """
    base = name.partition(".")[0]
    if timm.is_model(base):
        return base
    near = get_close_matches(base, timm.list_models(), n=4, cutoff=0.5)
    hint = f"close to it are {', '.join(near)}" if near else "timm.list_models() lists them"
    raise ValueError(f"architecture must be a timm model, got {name!r}; {hint}.")


class VICRegModel(PreTrainedModel):
    """A timm backbone and the VICReg expander.

    With one batch of views it is an encoder; with two it also computes the loss, over the rows of
    all processes. Built from a config the weights are timm's own random initialisation.

    Raises:
        ValueError: an architecture that timm does not have, or arguments it refuses.

    Source: Bardes et al. 2022, arXiv:2105.04906, figure 1.
    """

    config: VICRegConfig
    config_class = VICRegConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: VICRegConfig, *, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        config.architecture = check_architecture(config.architecture)
        args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
        config.model_args = args or None
        if backbone is None:
            backbone = _create_backbone(config.architecture, args)
        self.backbone = backbone
        # the width after pooling and any head layer, which num_features is not (mobilenetv4)
        self.num_features = int(backbone.head_hidden_size)  # pyright: ignore[reportArgumentType]
        self.expander = expander(self.num_features, config.expander_dims)
        # timm has initialised its own tensors; transformers must not do it again. On the meta
        # device nothing has a value yet, so there `_init_weights` fills what a file does not.
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            tensor._is_hf_initialized = tensor.device.type != "meta"  # pyright: ignore
        self.post_init()
        if config.pretrained_cfg is None:
            registry: Any = backbone.pretrained_cfg
            config.pretrained_cfg = encoder_pretrained_cfg(registry, args)

    @classmethod
    def from_timm(
        cls, name: str, *, model_args: dict[str, Any] | None = None, **config: Any
    ) -> VICRegModel:
        """Start from timm's pretrained weights, with a new expander.

        Args:
            name: timm model, with or without a pretrained tag ("resnet50.a1_in1k").
            model_args: keyword arguments for `timm.create_model`.
            **config: further fields of `VICRegConfig`.
        """
        architecture = check_architecture(name)
        args = model_args or {}
        backbone = _create_backbone(name, args, pretrained=True)
        pretrained_cfg = encoder_pretrained_cfg(backbone.pretrained_cfg, args)  # pyright: ignore
        settings = VICRegConfig(
            architecture=architecture,
            model_args=model_args,
            pretrained_cfg=pretrained_cfg,
            **config,
        )
        return cls(settings, backbone=backbone)

    @property
    def encoder(self) -> nn.Module:
        """The bare timm module: what is published."""
        return self.backbone

    def forward(
        self, pixel_values: Tensor, pixel_values_prime: Tensor | None = None
    ) -> VICRegOutput:
        """Encode one batch of views, or two and compute the loss.

        Args:
            pixel_values: (B, 3, S, S) normalised views.
            pixel_values_prime: (B, 3, S, S): the second view of each image, in the same order.

        Returns:
            last_hidden_state and pooler_output of the first views; with second views also loss,
            invariance, variance, covariance and embeddings.
        """
        features, y = self._represent(pixel_values)
        if pixel_values_prime is None:
            return VICRegOutput(last_hidden_state=features, pooler_output=y)
        # Each view passes by itself, so that batch statistics are a view's own, as the authors'.
        _, y_prime = self._represent(pixel_values_prime)
        return VICRegOutput(**self.compare(y, y_prime), last_hidden_state=features)

    def compare(self, y: Tensor, y_prime: Tensor) -> VICRegOutput:
        """Embed the representations of both views and compute the loss.

        Args:
            y: (B, F) representations of the first views.
            y_prime: (B, F) representations of the second views.

        Returns:
            loss, its terms, embeddings, and y as pooler_output.
        """
        z, z_prime = self.expander(y), self.expander(y_prime)
        terms = vicreg_loss(
            z,
            z_prime,
            sim_coeff=self.config.sim_coeff,
            std_coeff=self.config.std_coeff,
            cov_coeff=self.config.cov_coeff,
            gamma=self.config.gamma,
            eps=self.config.eps,
            variance_reduction=self.config.variance_reduction,  # pyright: ignore
        )
        return VICRegOutput(**terms._asdict(), embeddings=(z, z_prime), pooler_output=y)

    def _represent(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        backbone: Any = self.backbone
        features = backbone.forward_features(pixel_values)
        y = backbone.forward_head(features)
        if y.ndim != 2:
            raise ValueError(
                "the backbone must pool to shape (batch, features), got "
                f"{tuple(y.shape)}; remove global_pool from model_args."
            )
        return features, y

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *,
        include_expander: bool = True,
        max_shard_size: int | str | None = None,  # noqa: ARG002
    ) -> None:
        """Write the layout that stock AutoModel and timm load; see README, "The encoder".

        Args:
            save_directory: made if absent.
            is_main_process: other processes write nothing.
            state_dict: weights to write instead of the model's own.
            include_expander: also write the expander, in a file that only
                `VICRegModel.from_pretrained` reads.
            max_shard_size: taken for transformers' sake; there is always one file.
        """
        if not is_main_process:
            return
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = state_dict if state_dict is not None else self.state_dict()
        state = {k: v.detach().cpu().float().contiguous() if v.is_floating_point()
                 else v.detach().cpu().contiguous() for k, v in state.items()}  # fmt: skip
        encoder = {k[9:]: v for k, v in state.items() if k.startswith("backbone.")}
        head = {k: v for k, v in state.items() if k.startswith("expander.")}
        include_expander = include_expander and bool(head)
        save_file(encoder, directory / ENCODER_FILE, metadata={"format": "pt"})
        if include_expander:
            save_file(head, directory / EXPANDER_FILE, metadata={"format": "pt"})
            files = dict.fromkeys(encoder, ENCODER_FILE) | dict.fromkeys(head, EXPANDER_FILE)
            size = sum(v.numel() * v.element_size() for v in state.values())
            index = {"metadata": {"total_size": size}, "weight_map": files}
            _write_json(directory / INDEX_FILE, index)
        else:
            for name in (EXPANDER_FILE, INDEX_FILE):
                (directory / name).unlink(missing_ok=True)
        config = self.config.to_encoder_dict(self.num_features, include_expander=include_expander)
        _write_json(directory / "config.json", config)
        for name in (ENCODER_FILE, EXPANDER_FILE):
            if (directory / name).exists():  # safetensors lets nobody else read them
                shutil.copymode(directory / "config.json", directory / name)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        include_expander: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a VICReg encoder",
    ) -> str:
        """Publish the encoder in one commit, once stock transformers and timm agree with it.

        A card that the repository has is kept; else it gets a short one.

        Args:
            repo_id: `org/name`, made if absent.
            include_expander: also push the expander.
            private: of a new repository; None takes the organisation's default.
            token: None takes that of HF_TOKEN or `hf auth login`.
            revision: a branch, made if absent.
            create_pr: open a pull request instead.

        Returns:
            Address of the commit.

        Raises:
            ValueError: an id or a revision that cannot be.
            ExportError: what was written does not load as this model.
            HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
        """
        from vicreg_hf.hub import open_repository
        from vicreg_hf.publishing import push_model

        repo_id = open_repository(
            repo_id, private=private, token=token, revision=revision, create_pr=create_pr
        )
        return push_model(
            self, repo_id, include_expander=include_expander, token=token, revision=revision,
            create_pr=create_pr, commit_message=commit_message,
        )  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a loaded file does not hold: timm's buffers, a new expander."""
        target: Any = module
        if hasattr(module, "init_non_persistent_buffers"):
            target.init_non_persistent_buffers()
        elif hasattr(module, "_get_pos_embed_values") and target.feat_shape is not None:
            old = target.pos_embed
            target.pos_embed = target._get_pos_embed_values(
                feat_shape=target.feat_shape, device=old.device, dtype=old.dtype
            )
        elif hasattr(module, "reset_parameters"):
            target.reset_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        backbone: Any = self.backbone
        backbone.set_grad_checkpointing(enable)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError("a VICRegModel reads images and has no token embeddings.")


def _create_backbone(name: str, model_args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **{**model_args, "num_classes": 0})
    except TypeError as error:
        raise ValueError(
            f"model_args must be arguments of timm's {name}, got {model_args}: {error}."
        ) from error
    except (RuntimeError, AssertionError, OSError) as error:
        weights = "with pretrained weights " if pretrained else ""
        raise ValueError(
            f"timm must be able to build {name} {weights}from model_args, got {model_args}: "
            f"{' '.join(str(error).split())}"
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


AutoConfig.register("vicreg", VICRegConfig, exist_ok=True)
AutoModel.register(VICRegConfig, VICRegModel, exist_ok=True)
