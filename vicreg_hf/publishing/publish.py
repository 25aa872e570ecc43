"""Publishing encoders: finding what a run made, and pushing it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from vicreg_hf.hub.api import check_repo_id, check_revision, open_repository
from vicreg_hf.hub.card import SECOND
from vicreg_hf.hub.layout import DIRECTORY
from vicreg_hf.hub.push import _exported, _push
from vicreg_hf.publishing.loading import find_encoder, load_model
from vicreg_hf.publishing.second_encoder import push_second_encoder
from vicreg_hf.runtime.files import temporary_folder


def publish(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    include_expander: bool = False,
    revision: str | None = None,
    onnx: bool = False,
    license: str | None = None,  # noqa: A002
    token: str | bool | None = None,
) -> str:
    """Push what a run made, in one commit, with its card.

    A second branch's encoder goes to a repository of its own, `org/name-prime`.

    Args:
        source: output_dir of a run, or a directory that `VICRegModel.from_pretrained` loads.
        repo_id: `org/name`, made if absent.
        private: of a new repository.
        include_expander: also push the expander.
        revision: a branch, made if absent.
        onnx: also push onnx/model.onnx.
        license: of the weights, in the card; None leaves what the card says.
        token: None takes that of HF_TOKEN or `hf auth login`.

    Returns:
        Address of the first encoder's commit.

    Raises:
        ValueError: a source, an id or a revision that cannot be.
        ExportError: the encoder does not load as what it was.
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    directory = find_encoder(source)
    model, has_expander = load_model(directory)
    if include_expander and not has_expander:
        raise ValueError(
            f"include_expander needs an expander, and {directory} holds none; publish the "
            "output_dir of the run, or leave it out."
        )
    with temporary_folder() as aside:
        # before there are repositories, which nothing would come to if this failed
        folder = _exported(model, aside, include_expander=include_expander, onnx=onnx)
        where: Any = {"token": token, "revision": revision}
        repo_id = open_repository(repo_id, private=private, **where)
        second = Path(source) / DIRECTORY
        if (second / "config.json").is_file():
            beside = open_repository(f"{repo_id}{SECOND}", private=private, **where)
            push_second_encoder(
                second, beside, first_id=repo_id, include_expander=include_expander,
                license=license, **where,
            )  # fmt: skip
        return _push(folder, model, repo_id, license=license, card=directory, **where)


def retry_command(source: str | Path, repo_id: str, *, private: bool = False) -> str:
    """The command that pushes a run's encoder again."""
    words = ["python", "scripts/publish.py", str(source), "--repo_id", repo_id]
    return shlex.join([*words, "--private"] if private else words)
