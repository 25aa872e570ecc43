"""What a run starts from: settings that follow from `init_from`, and weights from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vicreg_hf.checkpoints.reading import newest_checkpoint, read_manifest
from vicreg_hf.configuration_vicreg import without_classes
from vicreg_hf.hub.layout import CONFIG_FILE
from vicreg_hf.hub.source import Source, find_source, names_architecture, read_source, split_address
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.models.branch import Branch
from vicreg_hf.models.timm_models import adapt_backbone, check_architecture, create_backbone
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.settings.pretraining import PretrainingArguments

INIT, PRIME, PRIME_AHEAD = "init_from", "prime_init_from", "prime_"
ADAPTED = {
    "in_chans", "img_size", "dynamic_img_size", "output_stride", "drop_rate", "drop_path_rate",
}  # fmt: skip
"""Arguments of timm that may differ from the source's: weights are adapted to them, or the same."""


@dataclass(frozen=True)
class Start:
    """The encoder that a branch starts from."""

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    facts: dict[str, Any]
    """See `Source.facts`."""
    source: Source | None
    """None where a run resumes: the weights are those of its own checkpoint."""

    def create_backbone(self, model_args: Mapping[str, Any]) -> nn.Module:
        """The encoder, adapted to these arguments.

        Raises:
            ValueError: the weights do not fit.
        """
        if self.source is None:
            return create_backbone(self.architecture, model_args)
        try:
            return adapt_backbone(
                self.architecture, model_args, state=self.source.state,
                pretrained_cfg=self.pretrained_cfg, source_args=self.model_args,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"Of {self.facts['name']}, {error}") from error


Starts = Mapping[str, Start]
"""What the branches start from, by setting: init_from, prime_init_from."""


def resolve_starts(
    args: PretrainingArguments, *, before: int | None = None
) -> tuple[PretrainingArguments, dict[str, Start]]:
    """Read what a run starts from, and fill in the architecture and arguments that follow.

    A run that goes on from its own checkpoint does not need the source any more.

    Args:
        before: see `setup`.

    Raises:
        ValueError: a source that cannot be read, or settings that contradict it.
    """
    if args.init_from is None and args.prime_init_from is None:
        return args, {}
    saved = None
    if args.resume != "never":
        saved, _ = newest_checkpoint(Path(str(args.output_dir)) / "checkpoints", before=before)
    args = _with_transformers_encoder(args, saved)
    starts: dict[str, Start] = {}
    for setting, ahead in ((INIT, ""), (PRIME, PRIME_AHEAD)):
        name: str | None = getattr(args, setting)
        if name is None or (setting == PRIME and args.prime_pretrained):
            continue
        start = None if saved is None else _saved_start(saved, setting, name, ahead)
        if start is None:
            source = read_source(name, setting, prime=setting == PRIME)
            start = Start(
                source.architecture, source.model_args, source.pretrained_cfg, source.facts, source
            )
        starts[setting] = start
        args = _with_start(args, start, ahead, f"{setting} {name!r}")
    return args, starts


def _saved_start(checkpoint: Path, setting: str, name: str, ahead: str) -> Start | None:
    """What a run that goes on had started from; None if that was something else."""
    state = read_manifest(checkpoint)["state"]
    settings, facts = state["settings"], (state.get("starts") or {}).get(setting)
    if facts is None or settings.get(setting) != name:
        return None
    config = json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    cfg = (config["prime"] if ahead else config)["pretrained_cfg"]
    cfg["input_size"] = facts["input_size"]
    return Start(facts["architecture"], facts["model_args"], cfg, facts, None)


def _with_start(
    args: PretrainingArguments, start: Start, ahead: str, where: str
) -> PretrainingArguments:
    """The settings with the source's architecture and arguments.

    Raises:
        ValueError: others were given.
    """
    named: str | None = getattr(args, f"{ahead}architecture")
    remedy = f"leave it out, or start from another encoder than {where}."
    if named is not None:
        base = check_architecture(named, f"{ahead}architecture")
        if base != start.architecture:
            raise ValueError(
                f"{ahead}architecture must be that of the encoder to start from, "
                f"{start.architecture}, got {named}; {remedy}"
            )
    given: dict[str, Any] = getattr(args, f"{ahead}model_args") or {}
    own = json.loads(json.dumps(start.model_args))  # tuples become lists
    others = {
        key: value for key, value in (without_classes(given) or {}).items()
        if key not in ADAPTED and own.get(key, ...) != value
    }  # fmt: skip
    if others:
        raise ValueError(
            f"{ahead}model_args must be those of the encoder to start from, {own}, but for "
            f"{', '.join(sorted(ADAPTED))}, got {others}; {remedy}"
        )
    merged = {f"{ahead}architecture": start.architecture, f"{ahead}model_args": own | given or None}
    return replace(args, **merged)


def _with_transformers_encoder(
    args: PretrainingArguments, saved: Path | None
) -> PretrainingArguments:
    """The settings of a second encoder of texts or waveforms, which transformers loads.

    Raises:
        ValueError: it is not there, or another prime_architecture was given.
    """
    name = args.prime_init_from
    if name is None or args.prime_pretrained or args.prime_modality not in ("text", "audio"):
        return args
    settings = {} if saved is None else read_manifest(saved)["state"]["settings"]
    if settings.get(PRIME) == name:
        if not settings["prime_pretrained"]:
            return args
        place = settings["prime_architecture"]
    else:
        place, revision, local = split_address(name, PRIME)
        if args.prime_modality == "audio" or local:
            directory, _ = find_source(name, PRIME, prime=True)
            if args.prime_modality == "audio" and names_architecture(directory):
                return args
            place = str(directory) if local else place
        if revision is not None:
            raise ValueError(
                f"{PRIME} must be without a revision for encoders of transformers, got {name!r}."
            )
    if args.prime_architecture not in (None, place):
        raise ValueError(
            f"prime_architecture must be left out with {PRIME}, which says what it is, got "
            f"{args.prime_architecture!r}."
        )
    return replace(args, prime_architecture=place, prime_pretrained=True)


def default_side(starts: Starts) -> int:
    """The side in pixels of views where no setting says it: that of the source, or 224."""
    start = starts.get(INIT)
    return 224 if start is None else start.facts["input_size"][-1]


def load_expanders(model: VICRegModel, starts: Starts) -> list[str]:
    """Give the expanders the weights of their sources, where their widths are the same.

    Returns:
        A sentence for each expander that is new.

    Raises:
        ValueError: weights that do not fit.
    """
    said: list[str] = []
    for setting, start in starts.items():
        source = start.source
        if source is None:
            continue
        branch: VICRegModel | Branch | None = model if setting == INIT else model.prime
        assert branch is not None
        prime = model.config.prime or {}
        widths = model.config.expander_dims if setting == INIT else prime["expander_dims"]
        heads: list[Any] = [("" if setting == INIT else "second ", branch.expander, widths,
                             source.expander, source.expander_dims)]  # fmt: skip
        if branch is model and model.local_expander is not None:
            heads.append(("local ", model.local_expander, model.config.local_expander_dims,
                          source.local_expander, source.local_expander_dims))  # fmt: skip
        for which, head, own, state, theirs in heads:
            shown = "-".join(map(str, own))
            if not state:
                said.append(f"The {which}expander, {shown}, is new: {source.name} holds none.")
            elif theirs != list(own):
                said.append(
                    f"The {which}expander, {shown}, is new: that of {source.name} is "
                    f"{'-'.join(map(str, theirs))}."
                )
            else:
                try:
                    head.load_state_dict(state)
                except RuntimeError as error:
                    raise ValueError(
                        f"the {which}expander of {source.name} must have the widths {shown} that "
                        f"its {CONFIG_FILE} says: {one_line(error)[:400]}"
                    ) from error
    return said
