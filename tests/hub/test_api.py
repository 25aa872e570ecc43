"""Requests to a Hub that refuses, breaks off or is another: the sentences, and what stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import pytest
from hub import DROP, READER, SILENCE, STRANGER, WRITER, Hub, connected, running_hub

from vicreg_hf.hub import api
from vicreg_hf.hub.api import HubError, check_repo_id, check_revision, without_tokens

PAGE = b"<!doctype html><title>Log in to this network</title>"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub() as hub, connected(hub, tmp_path_factory.mktemp("home"), None):
        yield hub


@pytest.fixture
def hub(served: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(api, "FIRST_WAIT", 0.001)
    served.forget()
    return served


def push(repo_id: str, token: str | None = WRITER, **settings: Any) -> str:
    """Open a repository and push a file; return "pushed", or the error's sentence."""
    try:
        api.open_repository(repo_id, token=token)
        content = {"README.md": b"---\nlicense: mit\n---\n"}
        api.push_files(content, repo_id, commit_message="-", token=token, **settings)
    except HubError as error:
        sentence = str(error)
    else:
        return "pushed"
    assert token is None or token not in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_notATokenAtAll", r"needs an access token that the Hub knows.*\(401\).*hf auth login"),
        (None, r"\(401\)"),
        (READER, r"needs an access token that may write there.*\(403\).*role 'write'"),
    ],
)
def test_a_token_that_may_not_push_is_refused(token: str | None, sentence: str, hub: Hub) -> None:
    with pytest.raises(HubError, match=sentence):
        api.open_repository("org/name", token=token)
    assert not hub.repositories
    assert hub.count("POST", "/api/repos/create") == 1


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("kind", [None, "dataset", "space"])
def test_what_is_to_be_private_goes_to_no_public_repository(kind: str | None) -> None:
    where: dict[str, Any] = {"token": WRITER, "repo_type": kind}
    api.open_repository("org/seen", private=False, **where)
    with pytest.raises(ValueError, match=r"private must be left out .* got true for org/seen"):
        api.open_repository("org/seen", private=True, **where)
    assert api.open_repository("org/seen", new_private=True, **where) == "org/seen"
    for name, settings in (("org/a", {"private": True}), ("org/b", {"new_private": True})):
        api.open_repository(name, **settings, **where)
        assert api.look_at(name, **where).private
        assert api.open_repository(name, **settings, **where) == name


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, "must exist, with its revision, .*; check its name"),
        (413, "takes no upload of this size"),
        (418, r"refuses org/name \(418"),
    ],
)
def test_a_lasting_refusal_is_not_tried_again(status: int, sentence: str, hub: Hub) -> None:
    hub.fail("POST", "/commit/", status)
    assert re.search(sentence, push("org/name"))
    assert hub.count("POST", "/commit/") == 1


def test_a_refusal_of_the_card_says_what_is_wrong_with_it(hub: Hub) -> None:
    metadata = b'{"errors": [{"message": "\\"license\\" must be one of {those} known"}]}'
    hub.fail("POST", "^/api/validate-yaml", 400, content=metadata)
    assert push("org/card") == (
        "the Hub refuses org/card (400): Invalid metadata in README.md. "
        '- "license" must be one of {those} known'
    )


@pytest.mark.parametrize("status", [503, 409, DROP])
def test_a_failure_that_may_pass_is_tried_three_times(status: int, hub: Hub) -> None:
    hub.fail("POST", "org/once/commit/", status, times=2)
    assert push("org/once") == "pushed"
    hub.fail("POST", "org/always/commit/", status)
    sentence = push("org/always")
    assert "org/always" in sentence
    assert "tried 3 times" in sentence
    assert status == DROP or f"({status})" in sentence
    assert "developer.mozilla.org" not in sentence
    assert hub.count("POST", "org/always/commit") == 3
    assert len(hub.repositories["models/org/always"].commits) == 1


def test_a_hub_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "TIMEOUT", 0.3)
    hub.fail("GET", "^/api/models/org/reading", SILENCE)
    hub.fail("POST", "org/writing/commit/", SILENCE)
    hub.fail("POST", "org/once/commit/", SILENCE, times=1)
    for name in ("org/reading", "org/writing"):
        sentence = push(name)
        assert f"did not answer for {name} as the Hub does, tried 3 times" in sentence
        assert "timed out" in sentence
    assert push("org/once") == "pushed"
    assert hub.count("POST", "org/writing/commit") == 3


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("POST", "/repos/create", PAGE), ("POST", "/preupload/", b""), ("GET", "org/name", b"{}"),
        ("POST", "/commit/", b"null"),
    ],
)  # fmt: skip
def test_another_page_is_named(method: str, path: str, content: bytes, hub: Hub) -> None:
    hub.fail(method, path, 200, content=content)
    sentence = push("org/name")
    begin = f"{hub.endpoint} did not answer for org/name as the Hub does, tried 3 times"
    assert sentence.startswith(begin), sentence
    assert "log-in page" in sentence
    assert sentence.endswith("check HF_ENDPOINT and HTTPS_PROXY.")
    assert hub.count(method, path) == 3


def test_a_file_is_read_again_or_absent(hub: Hub) -> None:
    push("org/name")
    hub.fail("HEAD", "/README.md", 503, times=1)
    assert api.read_text("org/name", "README.md", token=WRITER) == "---\nlicense: mit\n---\n"
    assert api.read_text("org/name", "absent.md", token=WRITER) is None


@pytest.mark.usefixtures("hub")
def test_offline_mode_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "unset the `HF_HUB_OFFLINE` environment variable" in push("org/name")


@pytest.mark.parametrize(
    ("check", "name", "sentence"),
    [
        *((check_repo_id, x, "repo_id must be org/name") for x in ("../x", "a/b/c", "a/b\n", "")),
        *((check_revision, x, "revision must be a branch") for x in ("a b", "-f", "a//b", "v1\n")),
    ],
)
def test_names_with_another_form_are_refused(check: Any, name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(name)
    assert check_revision("release/v1.0") == "release/v1.0"


def test_tokens_are_never_shown() -> None:
    text = f"header 'Bearer {STRANGER}' and my-own-secret"
    assert without_tokens(text, "my-own-secret") == "header 'Bearer [token]' and [token]"
