"""The Hugging Face Hub: what is checked before a run, and pushing in one commit.

Every fault becomes one sentence, in which no token appears.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, get_token, validate_repo_id

from vicreg_hf.runtime.files import temporary_folder

ATTEMPTS = 3
"""Tries of a request that failed for a reason that may pass."""
FIRST_WAIT = 1.0
"""Seconds before the second try, doubled before each later one."""
CONNECTED = 30.0
"""Seconds within which a connection must be made."""
ANSWERED = 60.0
"""Seconds within which the Hub must go on answering, or taking what is sent, before it is asked
again; the client's own limit is none."""
OVERTAKEN = (409, 412)
"""Answers to a commit where another came first."""
PASSING = (408, 429, 500, 502, 503, 504, *OVERTAKEN)
STRANGE = (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError)
"""What the client raises where an answer is not the Hub's: no JSON, or JSON of another form."""

T = TypeVar("T")


class HubError(RuntimeError):
    """The Hub refused, or could not be reached."""


def check_repo_id(repo_id: str, name: str = "repo_id") -> str:
    """Return a repository's id, `org/name` or `name`, that the Hub takes.

    Args:
        name: what the sentence calls it.

    Raises:
        ValueError: it is of another form.
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
    """Return a branch's name that git takes.

    Raises:
        ValueError: it is of another form.
    """
    parts = revision.split("/")
    if not all(re.fullmatch(r"[\w-][\w.+-]*", part, re.ASCII) for part in parts) or (
        ".." in revision or revision.startswith("-") or revision.endswith((".", ".lock"))
    ):
        raise ValueError(
            "revision must be a branch such as main or v1.0, of letters, digits, '-', '_', '.' "
            f"and '/', got {revision!r}."
        )
    return revision


def open_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str | None = None,
) -> str:
    """Make a repository if there is none, and make sure that this token may write to it.

    Nothing is committed: the permission is asked for as a push would.

    Args:
        repo_id: `org/name`; `name` is the user's own.
        private: of a new repository; None takes the organisation's default.
        token: None takes that of HF_TOKEN or `hf auth login`.
        revision: a branch, made if absent.
        create_pr: ask only whether pull requests may be opened, in a repository that is there.
        repo_type: "model" or "dataset"; None is a model.

    Returns:
        The full id.

    Raises:
        ValueError: an id or a revision that cannot be.
        HubError: the Hub refuses, or cannot be reached.
    """
    check_repo_id(repo_id)
    if revision is not None:
        check_revision(revision)
    api = _api(token)

    def opened() -> str:
        kind: Any = {"repo_type": repo_type}
        full = api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(full, branch=revision, exist_ok=True, **kind)
        probe = CommitOperationAdd("README.md", b"-")
        api.preupload_lfs_files(full, [probe], revision=revision, create_pr=create_pr, **kind)
        return full

    return asked(opened, repo_id, token)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str | None = None,
    ignore: Collection[str] = (),
    removable: Callable[[str], bool] = lambda _: False,
) -> str:
    """Push everything in a folder as one commit, and nothing if it cannot be all.

    Args:
        folder: with its subfolders; hidden files stay behind.
        ignore: names of further files that stay behind.
        removable: whether a file of an earlier revision goes, in the same commit, unless it is in
            the folder.

    Returns:
        Address of the commit.

    Raises:
        HubError: the Hub refuses, or cannot be reached; the earlier revision is as it was.
    """
    api = _api(token)
    target: Any = {"repo_type": repo_type, "revision": revision}
    files = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name not in ignore
    }

    def pushed() -> str:
        info: Any = api.repo_info(repo_id, timeout=ANSWERED, **target)
        there = {file.rfilename for file in info.siblings or ()}
        stale = [name for name in there - files.keys() if removable(name)]
        # upload_folder may make several commits
        operations = [
            *(CommitOperationDelete(name) for name in sorted(stale)),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, create_pr=create_pr, **target
        ).commit_url

    return asked(pushed, repo_id, token)


def holds_file(
    repo_id: str, name: str, *, token: str | bool | None = None, revision: str | None = None
) -> bool:
    """Whether a repository has a file.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    api = _api(token)
    return asked(lambda: api.file_exists(repo_id, name, revision=revision), repo_id, token)


def read_text(
    repo_id: str, name: str, *, token: str | bool | None = None, revision: str | None = None
) -> str:
    """A file that a repository has.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    api = _api(token)
    with temporary_folder() as aside:
        path = asked(
            lambda: api.hf_hub_download(repo_id, name, revision=revision, local_dir=aside),
            repo_id, token,
        )  # fmt: skip
        return Path(path).read_text(encoding="utf-8")


def asked(request: Callable[[], T], repo_id: str, token: str | bool | None) -> T:
    """Ask the Hub, again where the reason for a failure may pass.

    Raises:
        HubError: says who was asked, what for, and the remedy.
    """
    for attempt in range(ATTEMPTS):
        try:
            with _limited():
                return request()
        except (*STRANGE, HTTPError, ValueError, OSError) as error:
            if not _is_of_the_hub(error):
                raise
            if not _may_pass(error) or attempt == ATTEMPTS - 1:
                raise HubError(without_tokens(_sentence(error, repo_id), token)) from None
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError


def without_tokens(text: str, token: str | bool | None = None) -> str:
    """The text, with anything that is or looks like an access token left out."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret.strip():
            text = text.replace(secret.strip(), "[token]")
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9_.-]{4,}", "[token]", text)


@contextmanager
def _limited() -> Iterator[None]:
    """Wait for no answer without end."""
    client = get_session()
    before = client.timeout
    client.timeout = (CONNECTED, ANSWERED, ANSWERED, ANSWERED)
    try:
        yield
    finally:
        client.timeout = before


def _api(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="vicreg_hf")


def _is_of_the_hub(error: Exception) -> bool:
    """Whether it is about an answer, or there was none."""
    asking = (HTTPError, ConnectionError, TimeoutError, LocalTokenNotFoundError)
    return isinstance(error, asking) or _status(error) is not None or _is_strange(error)


def _is_strange(error: Exception) -> bool:
    """Whether something else answers in the Hub's place."""
    return isinstance(error, STRANGE) or "improperly formatted" in str(error)


def _is_silence(error: Exception) -> bool:
    """Whether nothing came in time; the class is httpx's or httpx2's, as the client has it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint({"TimeoutException", "TimeoutError"})


def _may_pass(error: Exception) -> bool:
    lasting = (OfflineModeIsEnabled, LocalTokenNotFoundError)
    return not isinstance(error, lasting) and _status(error) in (None, *PASSING)


def _status(error: BaseException) -> int | None:
    """Of the answer; a refusal of a card's metadata is a ValueError that one has caused."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    return None if error.__cause__ is None else _status(error.__cause__)


def _sentence(error: Exception, repo_id: str) -> str:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"pushing to {repo_id} needs the Hub, but HF_HUB_OFFLINE is set; unset it."
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return (
            f"pushing to {repo_id} needs an access token that the Hub knows, got none or another "
            "(401); run `hf auth login`, or set HF_TOKEN."
        )
    if status == 403:
        return (
            f"pushing to {repo_id} needs an access token that may write there, got one that may "
            "not (403); make one with the role 'write' at https://huggingface.co/settings/tokens, "
            "or choose another repository."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the revision must exist in {repo_id}, and does not (404)."
    if status == 404:
        return (
            f"the repository {repo_id} must exist and be visible to the access token, and the "
            "Hub finds none (404); check its name, and who `hf auth whoami` says you are."
        )
    reason = re.sub(r"For more information check: \S+", "", str(error))
    reason = " ".join(reason.split()) or type(error).__name__
    if status is None and _is_strange(error):
        return (
            f"{constants.ENDPOINT} must answer for {repo_id} as the Hub does, and did not, asked "
            f"{ATTEMPTS} times ({type(error).__name__}: {reason}); probably a proxy or a network's "
            "log-in page answers in its place: open that address in a browser, or check "
            "HF_ENDPOINT and HTTPS_PROXY."
        )
    if _is_silence(error):
        return (
            f"{constants.ENDPOINT} must answer for {repo_id} within {ANSWERED:.0f} seconds, and "
            f"did not, asked {ATTEMPTS} times or more ({reason}); try again later, or check "
            "HF_ENDPOINT and HTTPS_PROXY."
        )
    if status in OVERTAKEN:
        return (
            f"a commit to {repo_id} must follow its newest one, and another came first ({status}), "
            f"tried {ATTEMPTS} times; push again when nothing else does: {reason}"
        )
    if status == 413:
        return (
            f"the Hub, or a proxy before it, takes no upload of this size for {repo_id} (413); "
            "push from a network without the proxy, or less at once: no expander, no ONNX."
        )
    if status == 429:
        return f"the Hub takes no more requests for now (429), asked {ATTEMPTS} times: {reason}"
    if status is None or status in PASSING:
        return f"the Hub could not be reached for {repo_id}, tried {ATTEMPTS} times: {reason}"
    return f"the Hub refuses {repo_id} ({status}): {reason}"
