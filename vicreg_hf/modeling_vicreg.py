"""VICRegModel: any timm backbone and the expander, as a transformers model.

Shapes: B images per process, F representation, D embedding, S side in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from vicreg_hf.checkpoints.reading import MODEL, load_average, paths_of_parts, read_tensors
from vicreg_hf.configuration_vicreg import METHOD_FIELDS, VICRegConfig, without_classes
from vicreg_hf.hub.layout import trainers_checkpoint, write_layout
from vicreg_hf.hub.source import directory_of, split_address
from vicreg_hf.loss.autograd import VICRegTerms
from vicreg_hf.loss.local import local_loss
from vicreg_hf.loss.multi_view import multi_view_loss
from vicreg_hf.loss.own import Loss, own_terms
from vicreg_hf.loss.vicreg import vicreg_loss
from vicreg_hf.models.batch_norm import count_once
from vicreg_hf.models.branch import Branch, BranchInput
from vicreg_hf.models.compiling import Compiled, call_directly
from vicreg_hf.models.expander import expander
from vicreg_hf.models.feature_map import embed_cells, feature_map
from vicreg_hf.models.timm_models import (
    check_architecture,
    create_backbone,
    encoder_pretrained_cfg,
    is_timm,
    pooled,
    width_of,
)

LOCAL_TERMS = ("local_location", "local_feature")
"""Names of the two parts of the local loss."""
_WITHOUT_EFFECT = ("max_shard_size", "save_function", "safe_serialization")
"""Arguments of transformers' save_pretrained that change nothing where there is one file."""


@dataclass
class VICRegOutput(ModelOutput):
    """The output of `VICRegModel`; fields that were not computed are None."""

    loss: Tensor | None = None
    """Scalar, over all processes; present when there are two views or more."""
    invariance: Tensor | None = None
    """Scalar, detached and not weighted; likewise the next two."""
    variance: Tensor | None = None
    covariance: Tensor | None = None
    embeddings: tuple[Tensor, ...] | None = None
    """(B, D) of every view: z of the first views, of the second, and of any further."""
    last_hidden_state: Tensor | None = None
    """The backbone's feature map or tokens of the first views, as timm lays them out."""
    pooler_output: Tensor | None = None
    """(B, F): the representations of the first views."""
    terms: dict[str, Tensor] | None = None
    """Detached scalars by their names, "loss" first: those of a loss of one's own, in place of
    VICReg's three; or with a local loss these and its two parts."""
    feature_map: Tensor | None = None
    """(B, C, h, w) of one batch of views, where the model has a local loss."""

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The loss and its terms, detached, by the names that they are logged by."""
        named = self.terms or {name: self[name] for name in VICRegTerms._fields}
        return {name: value.detach() for name, value in named.items()}


class VICRegModel(PreTrainedModel):
    """A timm backbone and the VICReg expander, or two branches that share nothing.

    With one batch of views it is an encoder; with two it also computes the loss, over the rows of
    all processes. Built from a config the weights are timm's own random initialisation.

    Where config.prime describes a second branch, it is `prime`, an encoder and an expander of its
    own. The second view of each sample goes to it and all others to the first branch, so that
    either sees one kind of view, as the authors' experiments with different branches have it.

    Raises:
        ValueError: an architecture that timm does not have, or arguments it refuses.

    Where config.local_weight is above 0, `local_expander` embeds each cell of the backbone's
    feature map, and the loss also has VICRegL's local one; see `vicreg_hf.local_loss`. Of more than
    two views it is the mean over the pairs that the invariance term compares.

    Source: Bardes et al. 2022, arXiv:2105.04906, figure 1, and tables 3, 5 and 6; the local loss
    arXiv:2210.01571.
    """

    config: VICRegConfig
    config_class = VICRegConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(
        self,
        config: VICRegConfig,
        *,
        backbone: nn.Module | None = None,
        backbone_prime: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        config.architecture = check_architecture(config.architecture)
        config.model_args = without_classes(config.model_args)
        if backbone is None:
            backbone = create_backbone(config.architecture, config.model_args or {})
        self.backbone = backbone
        self.num_features = width_of(backbone)
        self.expander = expander(self.num_features, config.expander_dims)
        self.prime = None if config.prime is None else Branch(config.prime, backbone_prime)
        self.local_expander: nn.Module | None = None
        if config.local_weight:  # the last, so that all else begins as without it
            channels: Any = backbone.num_features
            self.local_expander = expander(channels, config.local_expander_dims)
        self.loss: Loss | None = None
        """In place of VICReg's: from (B, D) embeddings of two views to a scalar, or to named ones
        with "loss"."""
        self.gradient_checkpointing = False
        self._hooks: list[RemovableHandle] = []
        self._call: Callable[..., Any] = call_directly
        # timm has initialised its own tensors; transformers must not do it again. On the meta
        # device nothing has a value yet, so there `_init_weights` fills what a file does not.
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            tensor._is_hf_initialized = tensor.device.type != "meta"  # pyright: ignore
        self.post_init()
        if config.pretrained_cfg is None:
            config.pretrained_cfg = _pretrained_cfg(backbone, config.model_args)
        prime: Any = config.prime
        if self.prime is not None and is_timm(self.prime.backbone) and not prime["pretrained_cfg"]:
            prime["pretrained_cfg"] = _pretrained_cfg(self.prime.backbone, prime["model_args"])

    @classmethod
    def from_timm(
        cls, name: str, *, model_args: dict[str, Any] | None = None, **config: Any
    ) -> VICRegModel:
        """Start from timm's pretrained weights, with a new expander.

        With weights="separate" both branches do; a second branch of another kind has new weights.

        Args:
            name: timm model, with or without a pretrained tag ("resnet50.a1_in1k").
            model_args: keyword arguments for `timm.create_model`.
            **config: further fields of `VICRegConfig`.
        """
        architecture = check_architecture(name)
        backbone = create_backbone(name, model_args or {}, pretrained=True)
        settings = VICRegConfig(architecture=architecture, model_args=model_args, **config)
        second = None
        if settings.prime is not None and not config.get("prime"):  # the same architecture
            second = create_backbone(name, model_args or {}, pretrained=True)
        return cls(settings, backbone=backbone, backbone_prime=second)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load an encoder with its expander, or with a new one where there is none.

        Args:
            pretrained_model_name_or_path: the output_dir of a run, an encoder's directory, a
                training checkpoint, or `org/name` on the Hub, also as `org/name@revision`, with
                timm's prefixes `hf-hub:` and `local-dir:` or without. The encoder is of timm.
                Of a run with a moving average it is that.
            *model_args: as of transformers; likewise the keyword arguments. Weights become
                float32 unless dtype says otherwise.

        Raises:
            ValueError: there is no such place, or it holds no encoder of timm.
            OSError: a file lacks, or the Hub is not in reach.
        """
        place: Any = pretrained_model_name_or_path
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32
        if isinstance(place, (str, Path)):
            place, revision, local = split_address(str(place), "the place of a VICRegModel")
            if local and not kwargs.get("subfolder"):
                place = directory_of(Path(place)) or Path(place)
            if revision is not None:
                kwargs.setdefault("revision", revision)
        source, given = place, kwargs.get("state_dict")
        if isinstance(place, Path) and len(paths_of_parts(place, MODEL)) > 1:
            if kwargs.get("config") is None:
                found: Any = VICRegConfig.from_pretrained(
                    place, return_unused_kwargs=True, **kwargs
                )
                config, kwargs = found
                kwargs["config"] = config
            kwargs["state_dict"] = read_tensors(place, MODEL) if given is None else given
            source = None
        loaded = super().from_pretrained(source, *model_args, **kwargs)
        # a checkpoint has its moving average beside what is trained
        if isinstance(place, Path) and given is None:
            load_average(place, loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def encoder(self) -> nn.Module:
        """The bare timm module, which is published."""
        return self.backbone

    def set_image_size(self, image_size: int) -> None:
        """Say which side in pixels the views have, and the published encoder asks for.

        Raises:
            ValueError: the backbone was built for another size.
        """
        args = self.config.model_args or {}
        assert self.config.pretrained_cfg is not None
        cfg = encoder_pretrained_cfg(self.config.pretrained_cfg, args, image_size)
        if (size := cfg["input_size"][-1]) != image_size:
            raise ValueError(
                f"image_size must be the backbone's img_size, {size}, got {image_size}; build the "
                f"model with model_args={{'img_size': {image_size}}}."
            )
        self.config.pretrained_cfg = cfg

    @property
    def branches(self) -> list[VICRegModel | Branch]:
        """One for each set of weights, with a backbone and an expander: itself, and `prime`."""
        return [self] if self.prime is None else [self, self.prime]

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the loss and of its terms, as `VICRegOutput.scalars` has them."""
        return VICRegTerms._fields + (LOCAL_TERMS if self.local_expander is not None else ())

    @property
    def branches_compiled(self) -> bool:
        """True once `compile_branches` was called."""
        return self._call is not call_directly

    def compile_branches(self) -> None:
        """Have torch.compile fuse timm's backbones and the expanders, when each is first needed.

        `encoder` itself, the weights, their names and copies stay as they are.
        """
        self._call = Compiled()

    def second_model(self) -> VICRegModel:
        """The second branch as a model of one branch, with the same tensors.

        Raises:
            ValueError: there is no second branch, or it is none of timm's.
        """
        prime = self.config.prime
        if self.prime is None or prime is None or not is_timm(self.prime.backbone):
            raise ValueError("second_model needs a second branch with an encoder of timm.")
        own = {key: prime[key] for key in ("architecture", "model_args", "pretrained_cfg")}
        method: Any = {key: getattr(self.config, key) for key in METHOD_FIELDS}
        spectrogram = prime["preparation"] if prime["modality"] == "audio" else None
        settings = VICRegConfig(**method | own | {"expander_dims": [], "spectrogram": spectrogram})
        model = VICRegModel(settings, backbone=self.prime.backbone)
        model.expander, settings.expander_dims = self.prime.expander, prime["expander_dims"]
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_values_prime: BranchInput | None = None,
        places: Tensor | None = None,
        *,
        further_views: Sequence[Tensor] = (),
        local_views: Sequence[Tensor] = (),
        return_loss: bool = True,
        return_features: bool | None = None,
        encoded: bool = False,
        maps: Sequence[Tensor] = (),
    ) -> VICRegOutput:
        """Encode one batch of views, or two and more and compute the loss.

        Args:
            pixel_values: (B, C, S, S) normalised views.
            pixel_values_prime: (B, C, S, S): the second view of each image, in the same order; for
                a second branch of another modality, what its encoder takes. Alone it is encoded by
                the second branch.
            places: (B, V, 5), where the V views lie in their images, which a local loss needs; see
                `vicreg_hf.views.random_views.PLACE`.
            further_views: global ones beyond these two, each (B, C, S, S).
            local_views: small crops, each (B, C, S', S').
            return_loss: False leaves out the loss of two views, and their embeddings. `Trainer`
                evaluates the loss of models that have this parameter.
            return_features: whether there is a last_hidden_state; by default not where a model in
                training mode computes the loss. It is large, accelerate makes a float32 copy of it
                under mixed precision, and the output is held through the backward pass.
            encoded: whether all views are representations (B, F) already, so that only expanders
                and loss are left to compute; there is no last_hidden_state then.
            maps: with encoded, where there is a local loss: the feature map (B, C, h, w) of every
                view.

        Returns:
            last_hidden_state and pooler_output of the first views; with second views also loss,
            invariance, variance, covariance and embeddings; with second views alone pooler_output.
            With return_dict=False, a tuple of what there is, in the order of `VICRegOutput`.

        Raises:
            ValueError: no views, or further and local ones without the second; for a local loss no
                places of every view, a loss of one's own, or a backbone without a feature map.
        """
        if pixel_values_prime is None and (len(further_views) or len(local_views)):
            raise ValueError(
                "further_views and local_views are compared with two views, got no "
                "pixel_values_prime."
            )
        if pixel_values is None:
            if pixel_values_prime is None:
                raise ValueError("a model needs pixel_values or pixel_values_prime, got neither.")
            return VICRegOutput(pooler_output=self._represent_prime(pixel_values_prime, []))
        others = [*further_views, *local_views]
        maps = list(maps)
        if pixel_values_prime is not None and return_loss:
            self._check_local_loss(places, 2 + len(others))
        if encoded:
            features, y, y_prime = None, pixel_values, pixel_values_prime
        else:
            features, y = self._encode(pixel_values, maps)
            if return_features is None:
                return_features = pixel_values_prime is None or not (return_loss and self.training)
            if not return_features:
                features = None
            if pixel_values_prime is None or not return_loss:
                return VICRegOutput(
                    last_hidden_state=features, pooler_output=y, feature_map=next(iter(maps), None)
                )
            # Each view passes by itself, so that batch statistics are its own, as the authors'.
            y_prime = self._represent_prime(pixel_values_prime, maps)
            others = [self._encode(view, maps)[1] for view in others]
        # The second view alone goes to the second branch.
        z = [self._call(_embed, self.expander, y)]
        z += [self._call(_embed, self.branches[-1].expander, y_prime)]
        z += [self._call(_embed, self.expander, other) for other in others]
        num_global = 2 + len(further_views)
        terms: dict[str, Any]
        if self.loss is not None:
            own = own_terms(self.loss, z[:num_global], z[num_global:])
            terms = {"loss": own["loss"], "terms": own | {"loss": own["loss"].detach()}}
        elif others:
            found = multi_view_loss(z[:num_global], z[num_global:], **self.config.loss_settings)
            terms = found._asdict()
        else:
            terms = vicreg_loss(*z, **self.config.loss_settings)._asdict()
        if self.local_expander is not None and places is not None:
            terms |= self._with_local_loss(terms, maps, places, num_global)
        return VICRegOutput(
            **terms, embeddings=tuple(z), last_hidden_state=features, pooler_output=y
        )

    def _encode(self, view: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute features and representations; for a local loss the map is appended to `maps`."""
        features, y = self._call(pooled, self.backbone, view)
        if self.local_expander is not None:
            height, width = view.shape[-2:]
            maps.append(feature_map(self.backbone, features, (height, width)))
        return features, y

    def _represent_prime(self, inputs: BranchInput, maps: list[Tensor]) -> Tensor:
        if isinstance(inputs, Tensor) and self.prime is None:
            return self._encode(inputs, maps)[1]
        if self.prime is not None and not is_timm(self.prime.backbone):
            return self.prime.represent(inputs)  # texts come in many lengths
        return self._call(pooled, self.branches[-1].backbone, inputs)[1]

    def _check_local_loss(self, places: Tensor | None, num_views: int) -> None:
        if self.local_expander is None:
            return
        shape = tuple(places.shape) if isinstance(places, Tensor) else None
        if shape is None or shape[1:] != (num_views, 5):
            found = f"shape {shape}" if shape else type(places).__name__
            raise ValueError(
                f"places must be (images, {num_views} views, 5) where local_weight is above 0, got "
                f"{found}; TwoViews.for_model(model) gives them with the views."
            )
        if self.loss is not None:
            raise ValueError(
                "loss must be VICReg's own where local_weight is above 0, got another."
            )

    def _with_local_loss(
        self, terms: Mapping[str, Tensor], maps: Sequence[Tensor], places: Tensor, num_global: int
    ) -> dict[str, Any]:
        """The loss and the detached terms by name, with the local loss of all maps.

        Args:
            terms: VICReg's, by name.
            maps: (B, C, h, w) of every view, the global ones first.
        """
        config, found = self.config, []
        z = [self._call(embed_cells, self.local_expander, own) for own in maps]
        for i, j in itertools.combinations(range(len(z)), 2):
            if i < num_global:  # two local views are never compared
                matches = config.local_matches if j < num_global else config.local_view_matches
                found.append(local_loss(
                    z[i], z[j], places[:, i], places[:, j], matches=matches, **config.loss_settings
                ))  # fmt: skip
        local, *parts = (torch.stack(values).mean() for values in zip(*found, strict=True))
        loss = (1 - config.local_weight) * terms["loss"] + config.local_weight * local
        named = {**terms, "loss": loss.detach(), **dict(zip(LOCAL_TERMS, parts, strict=True))}
        return {"loss": loss, "terms": named}

    def load_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the weights of a whole model, as of any module.

        transformers' `Trainer` reads model.safetensors of a checkpoint by itself, which holds the
        encoder alone, under timm's names. Then the rest is taken from the files beside it.

        Raises:
            ValueError: weights of a published encoder from anywhere else, none of which has a key
                of this model, so that `strict=False` would pass over them all.
        """
        if state_dict and state_dict.keys() == self.backbone.state_dict().keys():
            whole = trainers_checkpoint(state_dict)
            if whole is None:
                raise ValueError(
                    "load_state_dict needs backbone and expander, got the weights of a published "
                    "encoder alone, as model.safetensors holds them; VICRegModel.from_pretrained "
                    "reads both from its directory."
                )
            state_dict, strict = whole, True
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *,
        include_expander: bool = True,
        **unused: Any,
    ) -> None:
        """Write the layout that stock AutoModel and timm load; see README, "The encoder".

        Args:
            save_directory: made if absent.
            is_main_process: other processes write nothing.
            state_dict: weights to write instead of the model's own.
            include_expander: also write the expander, and a second branch if there is one, in
                files that only `VICRegModel.from_pretrained` reads.
            **unused: what else transformers takes and changes nothing here: max_shard_size,
                save_function and safe_serialization, as there is always one file of safetensors.

        Raises:
            ValueError: anything that would be another layout or place.
        """
        others = {
            name: value for name, value in unused.items() if value and name not in _WITHOUT_EFFECT
        }
        if others:
            raise ValueError(
                "save_pretrained writes the one layout that stock loaders take, got "
                f"{', '.join(others)}; leave it out, and publish with push_to_hub."
            )
        if not is_main_process:
            return
        write_layout(
            Path(save_directory),
            state_dict if state_dict is not None else self.state_dict(),
            self.config,
            num_features=self.num_features,
            include_expander=include_expander,
        )

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        repo_id: str,
        *,
        include_expander: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        publish_images: bool = False,
        commit_message: str = "Upload a VICReg encoder",
    ) -> str:
        """Publish the encoder in one commit, once stock transformers and timm agree with it.

        A card that the repository has is kept; else it gets a short one. It is printed where what
        is pushed, and who can see it.

        Args:
            repo_id: `org/name`, made if absent.
            include_expander: also push the expander.
            private: of a new repository; None takes the organisation's default.
            token: None takes that of HF_TOKEN or `hf auth login`.
            revision: a branch, made if absent.
            create_pr: open a pull request instead.
            publish_images: leave pictures of an earlier push that show images of the data; else
                they are deleted, and the card does not mention them.

        Returns:
            Address of the commit.

        Raises:
            ValueError: an id or a revision that cannot be.
            ExportError: what was written does not load as this model.
            HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
        """
        from vicreg_hf.hub.push import push_model

        return push_model(
            self, repo_id, include_expander=include_expander, private=private, token=token,
            revision=revision, create_pr=create_pr, commit_message=commit_message,
            publish_images=publish_images,
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

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.gradient_checkpointing = enable
        for branch in self.branches:
            backbone: Any = branch.backbone
            if is_timm(backbone):
                backbone.set_grad_checkpointing(enable)
            for part in backbone.modules():  # such as a text encoder's model
                if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
                    part._set_gradient_checkpointing(enable, *args, **kwargs)
        while self._hooks:
            self._hooks.pop().remove()
        if enable:
            self._hooks += count_once(self)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError("a VICRegModel reads images and has no token embeddings.")


def _pretrained_cfg(backbone: Any, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    return encoder_pretrained_cfg(backbone.pretrained_cfg, model_args or {})


def _embed(expander: nn.Module, y: Tensor) -> Tensor:
    return expander(y)


AutoConfig.register("vicreg", VICRegConfig, exist_ok=True)
AutoModel.register(VICRegConfig, VICRegModel, exist_ok=True)
