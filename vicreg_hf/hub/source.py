"""Encoders that training starts from: where they are, what they hold, and on which terms.

Nothing is unpickled; weights are read from safetensors alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.constants import REPOCARD_NAME as CARD_FILE
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from timm import is_model
from timm.models import get_pretrained_cfg
from torch import Tensor

from vicreg_hf.checkpoints.reading import (
    MANIFEST,
    newest_checkpoint,
    paths_of_parts,
    published_weights,
    read_manifest,
    read_tensors,
)
from vicreg_hf.configuration_vicreg import NESTED_KEY, VICRegConfig, without_classes
from vicreg_hf.hub.api import check_repo_id, check_revision, without_tokens
from vicreg_hf.hub.layout import (
    CONFIG_FILE,
    ENCODER_FILE,
    EXPANDER_FILE,
    LOCAL_FILE,
    PRIME_DIRECTORY,
)
from vicreg_hf.hub.record import starting_terms
from vicreg_hf.models.timm_models import check_architecture
from vicreg_hf.runtime.checks import one_line

LOCAL, HUB = "local-dir:", ("hf-hub:", "hf_hub:")
"""timm's prefixes of directories, and of repositories."""
KINDS = (
    "the output_dir of a run, an encoder's directory, a training checkpoint, or org/name on the Hub"
)
WANTED = (CONFIG_FILE, CARD_FILE, "*.safetensors", "*.safetensors.index.json")
FROM_ELSEWHERE = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of timm that load other weights, which may be pickled."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar", ".npz")


@dataclass(frozen=True)
class Source:
    """An encoder with what belongs to it, as it was found."""

    name: str
    """As it may be shown to others: an id on the Hub, or the last part of a path."""
    architecture: str
    """timm's name, without a tag."""
    model_args: dict[str, Any]
    """Arguments of timm that the encoder was built with."""
    pretrained_cfg: dict[str, Any]
    """timm's record of input size, mean and std."""
    state: dict[str, Tensor]
    """The encoder's weights by timm's names, float32, without a classifier's."""
    expander: dict[str, Tensor]
    """The expander's weights; empty where there are none."""
    expander_dims: list[int]
    """The widths of that expander."""
    local_expander: dict[str, Tensor]
    """The weights of the local loss's expander; empty where there are none."""
    local_expander_dims: list[int]
    """The widths of that expander."""
    facts: dict[str, Any]
    """The rest, as JSON: name, sha256 of the weights, base_model, license; architecture, model_args
    and input_size once more."""


def find_encoder(source: str | Path) -> Path:
    """The directory to publish from: a run's encoder, its newest checkpoint, or the source itself.

    Raises:
        ValueError: nothing there can be published.
    """
    found = directory_of(Path(source))
    if found is None:
        raise ValueError(
            "what is published must be the output_dir of a run, its encoder or a checkpoint, got "
            f"{str(source)!r}, which holds neither {ENCODER_FILE} nor a valid checkpoint."
        )
    return found


def directory_of(source: Path, first: str = "encoder") -> Path | None:
    """The directory that holds the weights of a run or is itself one; None if there is none."""
    for directory in (source / first, source / "encoder", source):
        files = [directory / CONFIG_FILE, *paths_of_parts(directory, ENCODER_FILE)]
        if all(file.is_file() for file in files):
            return directory
    return newest_checkpoint(source / "checkpoints")[0]


def split_address(name: str, setting: str = "init_from") -> tuple[str, str | None, bool]:
    """Tell a place on this machine from a repository: the path or id, a revision, and which it is.

    Args:
        name: as users give it, with or without timm's prefixes, an id also with @revision.
        setting: the setting that is named in the error.

    Returns:
        The path or the id, the revision if one is given, and whether it is on this machine.

    Raises:
        ValueError: it is neither.
    """
    bare, at_hub = name, False
    if name.startswith(LOCAL):
        bare = name.removeprefix(LOCAL)
    for prefix in HUB:
        if name.startswith(prefix):
            bare, at_hub = name.removeprefix(prefix), True
    if not at_hub and Path(bare).is_dir():
        return bare, None, True
    path_like = bare.startswith((".", "/", "~")) or bare.count("/") > 1 + bare.count("@") * 9
    if not at_hub and (name.startswith(LOCAL) or path_like or Path(bare).exists()):
        what = "is no directory" if Path(bare).exists() else "is not there"
        hint = ""
        if Path(bare).is_file():
            beside = Path(bare).parent
            hint = " convert_checkpoint.py makes a directory of a file."
            if bare.endswith(".safetensors") and (beside / CONFIG_FILE).is_file():
                hint = f" Name its directory, {beside}."
        raise ValueError(f"{setting} must be {KINDS}, got {name!r}, which {what}.{hint}")
    repo_id, _, revision = bare.partition("@")
    if not at_hub and "/" not in repo_id and is_model(repo_id.partition(".")[0]):
        flags = [setting.replace("init_from", flag) for flag in ("architecture", "pretrained")]
        remedy = f"--{flags[0]} {name} --{flags[1]} true starts"
        if not setting.endswith("init_from"):
            remedy = "VICRegModel.from_timm starts"
        raise ValueError(
            f"{setting} must be {KINDS}, got {name!r}, a model of timm; {remedy} from its weights."
        )
    check_repo_id(repo_id, setting)
    if revision:
        check_revision(revision)
    return repo_id, revision or None, False


def find_source(name: str, setting: str = "init_from", *, prime: bool = False) -> tuple[Path, str]:
    """The directory of an encoder, downloaded if need be, and the name to show others.

    Args:
        name: see `split_address`.
        setting: the setting that is named in errors.
        prime: the second branch's encoder, where it is that of a run with two.

    Raises:
        ValueError: it is not there, or cannot be downloaded.
    """
    place, revision, local = split_address(name, setting)
    if local:
        found = directory_of(Path(place), PRIME_DIRECTORY if prime else "encoder")
        if found is None:  # the sentence on what lacks is read_source's
            found = Path(place)
        return found, Path(place).resolve().name
    shown = place if revision is None else f"{place}@{revision}"
    try:
        folder = snapshot_download(place, revision=revision, allow_patterns=list(WANTED))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"{setting} must be {KINDS}, got {name!r}, which is no directory here and which the "
            "Hub does not have or does not show without an access token that may read it."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{setting} must be {KINDS}, got {name!r}, which is no directory here, and the Hub "
            f"is not in reach, nor is it in its cache: {without_tokens(one_line(error))}"
        ) from error
    except Exception as error:  # the client's errors have no common class
        raise ValueError(
            f"{setting} {name!r} must be a repository of the Hub that can be downloaded: "
            f"{without_tokens(one_line(error))}"
        ) from error
    return Path(folder), shown


def read_source(name: str, setting: str = "init_from", *, prime: bool = False) -> Source:
    """Read an encoder, its expander and its terms; for the arguments see `find_source`.

    Raises:
        ValueError: it is not there, is no encoder of timm, or its weights cannot be read.
    """
    directory, shown = find_source(name, setting, prime=prime)
    _, _, local = split_address(name, setting)
    where = f"{setting} {name!r}"
    config = _read_config(directory, where)
    weights = _read_weights(directory, published_weights(directory), where)
    expander: dict[str, Tensor] = {}
    of_cells: dict[str, Tensor] = {}
    second: dict[str, Any] | None = None
    if config.get("model_type") == VICRegConfig.model_type:
        second = config.get("prime") if prime else None
        if second is not None and second.get("architecture") is None:
            raise ValueError(f"{where} has a second branch without an encoder of timm.")
        ahead = "" if second is None else "prime."
        expander = _below(weights, f"{ahead}expander.")
        of_cells = _below(weights, "local_expander.")
        local_dims = config.get("local_expander_dims") or []
        weights = _below(weights, f"{ahead}backbone.")
        dims = (second or config)["expander_dims"]
        cfg, architecture, args = (
            (second or config).get(key) for key in ("pretrained_cfg", "architecture", "model_args")
        )
    else:
        ours = config.get(NESTED_KEY) or {}
        dims, local_dims = (ours.get(f"{a}expander_dims") or [] for a in ("", "local_"))
        if local_dims and (directory / LOCAL_FILE).is_file():
            of_cells = _below(_read_weights(directory, LOCAL_FILE, where), "local_expander.")
        if dims and (directory / EXPANDER_FILE).is_file():
            expander = _below(_read_weights(directory, EXPANDER_FILE, where), "expander.")
        # timm's older files have its record at the top
        cfg, architecture, args = (
            config.get("pretrained_cfg", config), config["architecture"], config.get("model_args")
        )  # fmt: skip
    architecture = check_architecture(str(architecture), f"the architecture of {where}")
    args, cfg = without_classes(args) or {}, dict(cfg or {})
    if elsewhere := sorted(args.keys() & FROM_ELSEWHERE):
        raise ValueError(
            f"{where} must name no other weights in its model_args, got {', '.join(elsewhere)}; "
            f"take them out of its {CONFIG_FILE}."
        )
    if all(key.startswith("timm_model.") for key in weights):
        weights = _below(weights, "timm_model.")
    channels = args.get("in_chans") or (cfg.get("input_size") or (3,))[0]
    if channels != 3:
        args["in_chans"] = channels
    _drop_classifier(weights, cfg, architecture)
    base, licence = _terms(
        directory, None if local else shown, cfg, architecture, prime=second is not None
    )
    registered = _registered(architecture)
    cfg["input_size"] = cfg.get("input_size") or (registered and registered.input_size)
    if args.get("img_size"):
        side: Any = args["img_size"]
        cfg["input_size"] = (channels, *([side, side] if isinstance(side, int) else side))
    heads = {f"expander.{key}": value for key, value in expander.items()}
    heads |= {f"local_expander.{key}": value for key, value in of_cells.items()}
    facts = {
        "name": shown,
        "sha256": _digest(weights | heads),
        "base_model": base,
        "license": licence,
        "architecture": architecture,
        "model_args": json.loads(json.dumps(args)),
        "input_size": list(cfg["input_size"] or (channels, 224, 224)),
    }
    return Source(
        shown, architecture, args, cfg, weights, expander, list(dims), of_cells, list(local_dims),
        facts,
    )  # fmt: skip


def names_architecture(directory: Path) -> bool:
    """Whether a directory holds an encoder of timm, whose config.json names its architecture."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("architecture"), str)


def _read_config(directory: Path, where: str) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{where} must be {KINDS}, and holds neither {CONFIG_FILE} nor a valid checkpoint."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{where} must have a {CONFIG_FILE} that is a JSON object.") from error
    if not isinstance(config.get("architecture"), str):
        kind = config.get("model_type") or "no architecture"
        raise ValueError(
            f"{where} must be an encoder of timm, whose {CONFIG_FILE} names its architecture, got "
            f"{kind!r}; transformers' own models cannot be started from."
        )
    return config


def _read_weights(directory: Path, file: str, where: str) -> dict[str, Tensor]:
    """The weights in a file, as float32 where they are of another precision."""
    parts = paths_of_parts(directory, file)
    missing = [path.name for path in parts if not path.is_file()]
    if missing and len(parts) > 1:
        raise ValueError(
            f"{where} must hold all {len(parts)} parts of its weights, and lacks "
            f"{', '.join(missing)}; put it back, or choose another checkpoint."
        )
    if missing:
        found = sorted(entry.name for entry in directory.iterdir())
        got = "no weights"
        if f"{file}.index.json" in found:
            got = "weights in several files; load and save them again with a larger max_shard_size"
        elif pickled := [name for name in found if name.endswith(PICKLED)]:
            got = (
                f"{pickled[0]}, which may hold code and is not read; save it as safetensors, or "
                "have scripts/convert_checkpoint.py do it"
            )
        raise ValueError(f"{where} must hold its weights in one {file}, got {got}.")
    try:
        state = read_tensors(directory, file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{where} must hold weights that can be read, and its {file} is damaged: "
            f"{one_line(error)}"
        ) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _drop_classifier(weights: dict[str, Tensor], cfg: Mapping[str, Any], architecture: str) -> None:
    """Leave out the classifier's weights, whose modules timm's record names."""
    registered = _registered(architecture)
    names = cfg.get("classifier") or (registered and registered.classifier) or ()
    for name in [names] if isinstance(names, str) else names:
        for part in ("weight", "bias"):
            weights.pop(f"{name}.{part}", None)


def _terms(
    directory: Path,
    hub_id: str | None,
    cfg: Mapping[str, Any],
    architecture: str,
    *,
    prime: bool,
) -> tuple[str | None, str | None]:
    """The repository that a card names as base_model, and the licence; None is not stated."""
    if (directory / MANIFEST).is_file():
        state = read_manifest(directory)["state"]
        return starting_terms(state["settings"], state.get("starts"), prime=prime)
    card: dict[str, Any] = {}
    if (directory / CARD_FILE).is_file():
        try:
            text = (directory / CARD_FILE).read_text(encoding="utf-8")
            card = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, TypeError):
            card = {}  # somebody else's, which states nothing that can be read
    known_base, known_licence = terms_of_record(cfg, architecture)
    base: Any = card.get("base_model") or known_base
    base = base[0] if isinstance(base, list) and base else base
    if hub_id is not None:
        base = hub_id.partition("@")[0]
    licence: Any = card.get("license") or known_licence
    licence = licence[0] if isinstance(licence, list) and licence else licence
    return base if isinstance(base, str) else None, str(licence) if licence else None


def terms_of_record(
    cfg: Mapping[str, Any] | None, architecture: str
) -> tuple[str | None, str | None]:
    """The repository and the licence that timm's record of some weights states, where it does."""
    cfg = cfg or {}
    registered = _registered(f"{architecture}.{cfg['tag']}") if cfg.get("tag") else None
    return registered and registered.hf_hub_id, cfg.get("license")


def terms_of(directory: Path, model: Any) -> tuple[str | None, str | None]:
    """The base_model and the licence for the card of a model that was loaded from a directory."""
    config = model.config
    return _terms(directory, None, config.pretrained_cfg or {}, config.architecture, prime=False)


def _registered(name: str) -> Any:
    """Timm's own record of a model; None where it has none, or none with this tag."""
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:
        return None


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights by name, whatever directory they are in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        content: Any = value.contiguous().flatten().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()
