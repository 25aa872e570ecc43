"""A Hub in this process: enough of its HTTP for the real clients to push, load and fail.

Repositories live in memory. Faults are asked for by request, so that a test says which one breaks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub.utils import close_session

WRITER, READER, STRANGER = "hf_writerTokenOfOrg", "hf_readerTokenOfOrg", "hf_tokenOfSomebodyElse"
DROP = -1
"""A fault: the connection is closed in the middle of the request."""
SILENCE = -2
"""A fault: the connection stays, and no answer comes."""


@dataclass
class Repository:
    """Branches are commits, and a commit is its files."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})

    def find(self, revision: str) -> int | None:
        for number in range(len(self.commits)):
            if revision == self.sha(number):
                return number
        return self.branches.get(revision)

    def sha(self, number: int) -> str:
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


@dataclass
class Fault:
    """The next `times` requests that match get a status, a dropped connection, or no answer."""

    method: str
    path: str
    status: int
    times: int = 10_000
    content: bytes | None = None
    """None is the Hub's own answer to a fault."""


class Hub:
    """What the server holds, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.endpoint = ""
        self.closed = threading.Event()

    def fail(self, *words: Any, **settings: Any) -> None:
        """Answer with a `Fault` from now on."""
        self.faults.append(Fault(*words, **settings))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def forget(self) -> None:
        """Be as new."""
        with self.lock:
            self.repositories.clear()
            self.faults.clear()
            self.requests.clear()

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty Hub on a free port of loopback."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


def online(hub: Hub, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """The environment of a client of this Hub, with a cache of its own."""
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return variables | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})


@contextmanager
def connected(hub: Hub, home: Path, token: str | None = WRITER) -> Iterator[None]:
    """Make this process a client of this Hub, with a cache of its own."""
    constants = huggingface_hub.constants
    template = "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        yield
    close_session()


class Refusal(Exception):  # noqa: N818 - it is an answer
    """An answer that says why there is no other."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.status == DROP:
            self.rfile.read(min(64, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.status, self.more = 200, dict[str, str]()
        if fault is not None and fault.status == SILENCE:
            self.hub.closed.wait()
            self.close_connection = True
        elif fault is not None:
            own = {"error": f"fault {fault.status}"}
            self.say(fault.status, own if fault.content is None else fault.content)
        else:
            try:
                content = self.answer(path)
                self.say(self.status, content)
            except Refusal as refusal:
                self.more |= refusal.headers
                self.say(refusal.status, {"error": str(refusal)})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def say(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in self.more.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self, path: str) -> Any:
        if self.token and self.token not in (WRITER, READER, STRANGER):
            raise Refusal(401, "Invalid username or password.")
        for method, pattern, function in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return function(self, *found.groups())
        raise Refusal(404, f"no route {self.command} {path}")

    def repository(self, key: str, *, write: bool = False) -> Repository:
        """The repository if this token may see it, and write to it if needed."""
        found = self.hub.repositories.get(key)
        if found is None or (found.private and self.token not in (WRITER, READER)):
            status = 404 if self.token else 401
            raise Refusal(status, "Repository not found", X_Error_Code="RepoNotFound")
        if write and self.token != WRITER:
            raise Refusal(403 if self.token else 401, "You may not write here.")
        return found

    def commit(self, found: Repository, revision: str) -> int:
        number = found.find(revision)
        if number is None:
            raise Refusal(404, "Revision not found", X_Error_Code="RevisionNotFound")
        return number

    # Answers

    def create(self) -> Any:
        wanted = json.loads(self.body)
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        key = f"{kind}s/{name}"
        if self.token != WRITER:
            raise Refusal(403 if self.token else 401, "You may not make repositories.")
        if kind == "space" and not wanted.get("sdk"):
            raise Refusal(400, "A Space needs an sdk.")
        if key in self.hub.repositories:
            self.status = 409  # it is there already
        else:
            self.hub.repositories[key] = Repository(wanted.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{key.removeprefix('models/')}"}

    def branch(self, key: str, name: str) -> Any:
        found = self.repository(key, write=True)
        if name in found.branches:
            raise Refusal(409, "Reference already exists")
        found.branches[name] = found.branches["main"]
        return {}

    def validate(self) -> Any:
        return {"errors": [], "warnings": []}

    def preupload(self, key: str, revision: str) -> Any:
        self.commit(self.repository(key, write=True), revision)
        regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        return {"files": [regular | {"path": f["path"]} for f in json.loads(self.body)["files"]]}

    def push(self, key: str, revision: str) -> Any:
        found = self.repository(key, write=True)
        self.commit(found, revision)
        files = dict(found.files(revision))
        for entry in map(json.loads, self.body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        with self.hub.lock:
            found.commits.append(files)
            number = found.branches[revision] = len(found.commits) - 1
        sha = found.sha(number)
        url = f"{self.hub.endpoint}/{key.removeprefix('models/')}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url}

    def info(self, key: str, revision: str = "main") -> Any:
        found = self.repository(key)
        number = self.commit(found, revision)
        kind, name = key.split("/", 1)
        card = found.commits[number].get("README.md", b"").decode()
        tagged = re.search(r"^pipeline_tag: (.+)$", card, re.MULTILINE)
        return {
            "_id": "0" * 24, "id": name, f"{kind[:-1]}Id": name, "private": found.private,
            "sha": found.sha(number), "tags": [], "downloads": 0, "likes": 0,
            "library_name": "transformers", "pipeline_tag": tagged[1] if tagged else None,
            "siblings": [{"rfilename": file} for file in found.commits[number]],
        }  # fmt: skip

    def tree(self, key: str, revision: str, folder: str) -> Any:
        found = self.repository(key)
        files = found.commits[self.commit(found, revision)]
        inside = {k: v for k, v in files.items() if k.startswith(folder)}
        if folder and not inside:
            raise Refusal(404, "Entry not found", X_Error_Code="EntryNotFound")
        return [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                for k, v in inside.items()]  # fmt: skip

    def resolve(self, kind: str | None, name: str, revision: str, file: str) -> Any:
        found = self.repository(f"{kind or 'models/'}{name}")
        number = self.commit(found, revision)
        self.more["X_Repo_Commit"] = found.sha(number)
        content = found.commits[number].get(file)
        if content is None:
            raise Refusal(404, "Entry not found", X_Error_Code="EntryNotFound")
        self.more["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        return content


_KEY = r"/api/((?:models|datasets|spaces)/[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", _KEY + r"/branch/(.+)", _Handler.branch),
    ("POST", _KEY + r"/preupload/(.+)", _Handler.preupload),
    ("POST", _KEY + r"/commit/(.+)", _Handler.push),
    ("GET", _KEY, _Handler.info),
    ("GET", _KEY + r"/revision/(.+)", _Handler.info),
    ("GET", _KEY + r"/tree/([^/]+)/?(.*)", _Handler.tree),
    ("GET HEAD", r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]
