"""Pushing an encoder and its card in one commit, after saying what is pushed where."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants

from vicreg_hf.hub.api import look_at, open_repository, push_files, read_text, visible_files
from vicreg_hf.hub.card import (
    CARD_FILE,
    PHOTOGRAPHS,
    PICTURES,
    model_card,
    personalise,
    without_photographs,
)
from vicreg_hf.hub.export import ONNX_FILE, EncoderModel, export_encoder
from vicreg_hf.hub.layout import (
    CONFIG_FILE,
    ENCODER_FILE,
    TRAINING_ONLY,
    files_to_push,
    is_published,
)
from vicreg_hf.hub.record import starting_terms
from vicreg_hf.runtime.files import temporary_folder

COMMIT_MESSAGE = "Upload a VICReg encoder"
REMOVABLE = (*TRAINING_ONLY, ONNX_FILE, *PICTURES)
"""Files of an earlier revision that are deleted when a push has none of them."""
PLANNED = (CARD_FILE, CONFIG_FILE, ENCODER_FILE, *PICTURES)
"""What a run pushes at its end."""
NO_LICENCE = "none; --license chooses one"
MOST_NAMES = 12
"""Files that are named before a push; of more the rest is counted."""
STOCK = (
    CARD_FILE, CONFIG_FILE, ENCODER_FILE, "model-*.safetensors", f"{ENCODER_FILE}.index.json",
    "generation_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template.jinja",
)  # fmt: skip
"""Files of transformers' own encoders and tokenizers; others in their directory stay there."""
PLACES = {"_name_or_path", "name_or_path"}
"""Fields in which releases of transformers note from which directory something was loaded."""


def push_model(
    model: EncoderModel,
    repo_id: str,
    *,
    include_expander: bool,
    private: bool | None,
    publish_images: bool,
    commit_message: str,
    **target: Any,
) -> str:
    """Export a model, and push what was written; see `VICRegModel.push_to_hub`."""
    repo_id = open_repository(repo_id, private=private, **target)
    with temporary_folder() as folder:
        export_encoder(model, folder, include_expander=include_expander)
        return push_encoder(
            folder, repo_id, include_expander=include_expander, commit_message=commit_message,
            short_card=model_card(model), publish_images=publish_images, **target,
        )  # fmt: skip


def push_encoder(
    directory: Path,
    repo_id: str,
    *,
    include_expander: bool = False,
    extra: Mapping[str, Path] | None = None,
    short_card: ModelCard | None = None,
    first_id: str | None = None,
    license: str | None = None,  # noqa: A002
    publish_images: bool = False,
    commit_message: str = COMMIT_MESSAGE,
    create_pr: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Push an encoder as it was written and verified, in one commit, to a repository that exists.

    Args:
        directory: where the encoder is, with its card and pictures if there are any.
        include_expander: also push the expander of a VICReg encoder.
        extra: further files, by their path in the repository.
        short_card: the card if neither the directory nor the repository has one.
        first_id: the first branch's repository if this is the second's; both cards name it.
        license: of the weights; None leaves what the card says.
        publish_images: also push pictures that show images of the data; else those of an earlier
            revision are deleted, and the card does not mention them.

    Returns:
        Address of the commit.

    Raises:
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    found = visible_files(directory)
    files = encoder_files(directory, include_expander=include_expander)
    if is_published(directory):
        files |= {name: found[name] for name in PICTURES if name in found}
    withheld = set() if publish_images else set(PHOTOGRAPHS)
    files = {name: file for name, file in files.items() if name not in withheld}
    files |= extra or {}
    removable = set(REMOVABLE)
    kept = text = None
    if CARD_FILE in found:
        text = found[CARD_FILE].read_text(encoding="utf-8")
    elif kept := read_text(repo_id, CARD_FILE, token=token, revision=revision):
        removable -= {*PICTURES} - withheld
        text = kept
    elif short_card is not None:
        text = str(short_card)
    if text is not None:
        text = text if publish_images else without_photographs(text)
        if text != kept or license is not None:
            text = personalise(text, first_id or repo_id, license)
            files[CARD_FILE] = text.encode()
    print(
        describe_push(
            repo_id, files, shows=_shown(files, withheld & found.keys()), removed=withheld,
            licence=licence_of(text) or NO_LICENCE, token=token, revision=revision,
        )
    )  # fmt: skip
    return push_files(
        files, repo_id, commit_message=commit_message, create_pr=create_pr, token=token,
        revision=revision, removable=lambda name: name in removable,
    )  # fmt: skip


def encoder_files(directory: Path, *, include_expander: bool = False) -> dict[str, Path | bytes]:
    """The files that loaders need of an encoder, by name, as paths or as their content."""
    if is_published(directory):
        return files_to_push(directory, include_expander=include_expander)
    found = visible_files(directory)
    return {
        name: _without_places(file) if name.endswith("config.json") else file
        for name, file in found.items() if any(fnmatch(name, s) for s in STOCK)
    }  # fmt: skip


def _without_places(file: Path) -> Path | bytes:
    """The content of a configuration without what it tells of a machine, or a file that is so."""
    text = file.read_text(encoding="utf-8")
    kept = json.loads(text, object_hook=lambda o: {k: o[k] for k in o if k not in PLACES})
    return file if kept == json.loads(text) else (json.dumps(kept, indent=2) + "\n").encode()


def licence_of(card: str | None) -> str | None:
    """The licence that a card states, if there is one."""
    data: Any = None if card is None else ModelCard(card, ignore_metadata_errors=True).data
    return None if data is None else data.get("license")


def describe_push(
    repo_id: str,
    files: Collection[str],
    *,
    shows: str,
    licence: str,
    later: bool = False,
    removed: Collection[str] = (),
    token: str | bool | None = None,
    revision: str | None = None,
    repo_type: str | None = None,
) -> str:
    """Say what is pushed: where, who can see it, which files, what they show, which licence.

    Args:
        files: by their paths in the repository.
        shows: a sentence on what of the data they show.
        later: whether it is pushed only at the end of a run.
        removed: files that are deleted if the repository has them.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    private, there, _ = look_at(repo_id, token=token, revision=revision, repo_type=repo_type)
    kind = f"{repo_type}s/" if repo_type else ""
    who = "private: only its members see it" if private else "public: everybody can see it"
    names = sorted(files)
    if len(names) > MOST_NAMES:
        names[MOST_NAMES:] = [f"and {len(names) - MOST_NAMES:,} more"]
    lines = [
        f"{'At the end this is pushed' if later else 'Pushing'} to {constants.ENDPOINT}/{kind}"
        f"{repo_id}{'' if revision is None else f' on {revision}'} ({who}): {', '.join(names)}.",
        shows,
    ]
    if gone := sorted({*removed} & there):
        lines.append(
            f"{', '.join(gone)} of an earlier push is deleted there; the repository's history "
            "still has it."
        )
    return " ".join([*lines, f"Licence: {licence}."])


def _shown(files: Collection[str], withheld: Collection[str]) -> str:
    """A sentence on whether files show images of the data; withheld are those that stay here."""
    if shown := sorted({*PHOTOGRAPHS} & {*files}):
        return f"{', '.join(shown)} shows images of the data; without --publish_images it stays."
    if not withheld:
        return "None of them shows images of the data."
    return (
        f"None of them shows images of the data: {', '.join(sorted(withheld))} "
        f"{'stays' if len(withheld) == 1 else 'stay'} here; --publish_images true changes that."
    )


def describe_run_push(
    repo_id: str, settings: Mapping[str, Any], starts: Mapping[str, Any], *, prime: bool = False
) -> str:
    """Say what a run will push at its end; for the arguments see `starting_terms`.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    withheld = set() if settings["publish_images"] else set(PHOTOGRAPHS)
    files = [name for name in PLANNED if name not in withheld and not (prime and name in PICTURES)]
    if prime and settings["prime_modality"] == "text":
        files.append("the tokenizer's files")
    _, licence = starting_terms(settings, starts, prime=prime)
    return describe_push(
        repo_id, files, shows=_shown(files, () if prime else withheld), later=True,
        licence=licence or NO_LICENCE, removed=withheld,
    )  # fmt: skip
