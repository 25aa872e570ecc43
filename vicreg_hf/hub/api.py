"""Requests to the Hugging Face Hub: the checks before a run, and pushing in one commit.

A request that fails for a reason that may pass is sent again a few times. Every other failure
becomes one sentence, in which no token appears.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import get_session, get_token, validate_repo_id

from vicreg_hf.runtime.files import temporary_folder

ATTEMPTS = 3
"""How often a request is sent that fails for a reason that may pass."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; the wait before the third is twice as long."""
TIMEOUT = 60.0
"""Seconds without an answer after which a request has failed; the client's own limit is none."""
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
"""Status codes of failures that may pass. 409 and 412 say that another commit came first."""
FAILURES = (
    HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError, LocalTokenNotFoundError,
    ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip
"""Errors of the client when there is no answer, or one that is no JSON or JSON of another form."""
SENTENCES = {
    401: "pushing to {repo_id} needs an access token that the Hub knows, got none or another "
    "(401); run `hf auth login`, or set HF_TOKEN.",
    403: "pushing to {repo_id} needs an access token that may write there, got one that may not "
    "(403); make one with the role 'write' at https://huggingface.co/settings/tokens, or choose "
    "another repository.",
    404: "the repository {repo_id} must exist, with its revision, and be visible to the access "
    "token, and the Hub finds none (404); check its name, and who `hf auth whoami` says you are.",
    413: "the Hub, or a proxy before it, takes no upload of this size for {repo_id} (413); push "
    "from a network without the proxy, or less at once: no expander, no ONNX.",
}
"""Sentences that tell a user what has happened and what helps, by status code."""

T = TypeVar("T")


class HubError(RuntimeError):
    """The Hub refused, or could not be reached."""


class RepositoryInfo(NamedTuple):
    """What the Hub tells of a repository."""

    private: bool
    files: set[str]
    commit: str | None
    """The newest commit of the revision."""


def check_repo_id(repo_id: str, name: str = "repo_id") -> str:
    """Return the id of a repository, `org/name` or `name`, if the Hub takes it.

    Args:
        name: the setting that is named in the error.

    Raises:
        ValueError: the id has another form.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{name} must be org/name, of letters, digits, '-', '_' and '.', at most 96 "
            f"characters, got {repo_id!r}."
        ) from None
    return repo_id


def check_revision(revision: str) -> str:
    """Return the name of a branch if git takes it.

    Raises:
        ValueError: the name has another form.
    """
    named = re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", revision, re.ASCII)
    if not named or ".." in revision or revision.endswith((".", ".lock")):
        raise ValueError(
            "revision must be a branch such as main or v1.0, of letters, digits, '-', '_', '.' "
            f"and '/', got {revision!r}."
        )
    return revision


def check_licence(licence: str) -> str:
    """Return the identifier of a licence if it has the form of the Hub's.

    Raises:
        ValueError: it has another.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(
            "license must be an identifier of the Hub such as apache-2.0 or cc-by-4.0, in small "
            f"letters, got {licence!r}; https://huggingface.co/docs/hub/repositories-licenses "
            "lists them."
        )
    return licence


def open_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    new_private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str | None = None,
) -> str:
    """Make a repository if there is none, and make sure that this token may push to it.

    Args:
        repo_id: `org/name`; `name` is the user's own.
        private: True asks for a repository that only its members see, False for a public one if it
            is new; None takes one that exists as it is.
        new_private: whether a new repository is private where private is None; None takes the
            organisation's default.
        token: None takes that of HF_TOKEN or `hf auth login`.
        revision: a branch, made if absent.
        create_pr: request only that pull requests may be opened, in a repository that exists.
        repo_type: "model", "dataset" or "space", which is one of gradio; None is a model.

    Returns:
        The full id.

    Raises:
        ValueError: an id or a revision has a form that the Hub does not take, or the repository is
            public where it must be private.
        HubError: the Hub refuses, or cannot be reached.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    visibility = new_private if private is None else private

    def opened(api: HfApi) -> str:
        kind: Any = {"repo_type": repo_type}
        sdk: Any = {"space_sdk": "gradio"} if repo_type == "space" else {}
        full = api.create_repo(repo_id, private=visibility, exist_ok=True, **kind, **sdk).repo_id
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(full, branch=revision, exist_ok=True, **kind)
        probe = CommitOperationAdd("README.md", b"-")
        api.preupload_lfs_files(full, [probe], revision=revision, create_pr=create_pr, **kind)
        return full

    full = _request(opened, repo_id, token)
    if private and not look_at(full, token=token, repo_type=repo_type).private:
        raise ValueError(
            f"private must be left out for a repository that everybody can see, got true for "
            f"{full}; make it private on the Hub, or choose another name."
        )
    return full


def check_licence_at_hub(licence: str, repo_id: str, token: str | bool | None = None) -> None:
    """Ask the Hub whether it knows a licence, as it will before it takes a card.

    Raises:
        HubError: it does not, or cannot be reached.
    """
    card = ModelCard(f"---\nlicense: {licence}\n---\n")

    def validated(_: HfApi) -> None:
        try:
            card.validate()
        except ValueError as error:  # which hides that the Hub has answered
            raise ValueError(f"license {licence!r}: {error}") from error.__context__

    _request(validated, repo_id, token)


def look_at(
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    repo_type: str | None = None,
) -> RepositoryInfo:
    """Look whether a repository is private, and which files it has.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """

    def read_info(api: HfApi) -> RepositoryInfo:
        target: Any = {"repo_type": repo_type, "revision": revision, "timeout": TIMEOUT}
        info: Any = api.repo_info(repo_id, **target)
        files = {file.rfilename for file in info.siblings or ()}
        return RepositoryInfo(bool(info.private), files, info.sha)

    return _request(read_info, repo_id, token)


def visible_files(folder: Path, *, ignore: Collection[str] = ()) -> dict[str, Path]:
    """The files of a folder and its subfolders by relative path, but for hidden ones."""
    return {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name not in ignore
    }


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    commit_message: str,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str | None = None,
    removable: Callable[[str], bool] = lambda _: False,
) -> str:
    """Push files as one commit, and none of them if it cannot be all.

    Args:
        files: a path or the content, by the path in the repository.
        removable: whether a file of an earlier revision that is not among these is deleted in the
            same commit.

    Returns:
        Address of the commit.

    Raises:
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    target: Any = {"repo_type": repo_type, "revision": revision}

    def pushed(api: HfApi) -> str:
        info: Any = api.repo_info(repo_id, timeout=TIMEOUT, **target)
        names = {file.rfilename for file in info.siblings or ()}
        # HfApi.upload_folder would do, but may make several commits
        operations = [
            *(CommitOperationDelete(name) for name in sorted(names - files.keys())
              if removable(name)),
            *(CommitOperationAdd(name, content) for name, content in files.items()),
        ]  # fmt: skip
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, create_pr=create_pr, **target
        ).commit_url

    return _request(pushed, repo_id, token)


def read_text(
    repo_id: str, name: str, *, token: str | bool | None = None, revision: str | None = None
) -> str | None:
    """The text of a file in a repository, or None if it has no such file.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """

    def read(api: HfApi) -> str | None:
        try:
            path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
        except RemoteEntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")

    with temporary_folder() as folder:
        return _request(read, repo_id, token)


def without_tokens(text: str, token: str | bool | None = None) -> str:
    """The text with everything that is or looks like an access token replaced by "[token]"."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret.strip():
            text = text.replace(secret.strip(), "[token]")
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9_.-]{4,}", "[token]", text)


def _request(send: Callable[[HfApi], T], repo_id: str, token: str | bool | None) -> T:
    """Send a request, again where the reason for a failure may pass.

    Raises:
        HubError: the sentence says which repository was meant, what failed, and the remedy.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _time_limit():
                return send(HfApi(token=token, library_name="vicreg_hf"))
        except FAILURES as error:
            status = _status(error)
            lasting = isinstance(error, OfflineModeIsEnabled) or status not in (None, *PASSING)
            if lasting or attempt == ATTEMPTS:
                sentence = _sentence(error, status, repo_id)
                raise HubError(without_tokens(sentence, token)) from None
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
    raise AssertionError


@contextmanager
def _time_limit() -> Iterator[None]:
    """Give up each request of the Hub's client after `TIMEOUT` seconds without an answer."""
    client = get_session()
    before, client.timeout = client.timeout, TIMEOUT
    try:
        yield
    finally:
        client.timeout = before


def _status(error: BaseException) -> int | None:
    """The status code of an answer; a refusal of a card is a ValueError that an answer caused."""
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    return None if error.__cause__ is None else _status(error.__cause__)


def _sentence(error: Exception, status: int | None, repo_id: str) -> str:
    if status in SENTENCES:
        return SENTENCES[status].format(repo_id=repo_id)
    reason = re.sub(r"For more information check: \S+", "", str(error))
    reason = " ".join(reason.split()) or type(error).__name__
    times = f", tried {ATTEMPTS} times" if status in (None, *PASSING) else ""
    if status is not None:
        return f"the Hub refuses {repo_id} ({status}){times}: {reason}"
    return (
        f"{constants.ENDPOINT} did not answer for {repo_id} as the Hub does{times}, {TIMEOUT:g} "
        f"seconds at most each ({type(error).__name__}: {reason}); try again later. If a browser "
        "shows the log-in page of a network there, log in, or check HF_ENDPOINT and HTTPS_PROXY."
    )
