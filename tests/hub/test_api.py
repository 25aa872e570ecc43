"""Pushing to a Hub that refuses, breaks off or is another: what a user is told and what stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import DROP, READER, SILENCE, WRITER, Hub, online, running_hub
from workflow import ROOT, SMALL, environment, run, write_images

PAGE = b"<!doctype html><title>Log in to this network</title>"

PUSHER = """
import json, os, sys, time
import vicreg_hf.hub.api
from families import trained
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # before asking again
model = trained()
for line in sys.stdin:
    vicreg_hf.hub.api.ANSWERED, token, *repos = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    said = {}
    for repo in repos:
        try:
            model.push_to_hub(repo)
            said[repo] = "pushed"
        except vicreg_hf.hub.api.HubError as error:
            said[repo] = str(error)
    print(json.dumps(said), flush=True)
"""


class Pusher:
    """A Hub, and a process whose every push goes there."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self._errors = hub, folder / "stderr"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PUSHER], cwd=ROOT / "tests/helpers", text=True,
                env=environment(**online(hub, folder)), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def attempts(self, token: str | None, *repos: str, answered: float = 60) -> dict[str, str]:
        """What pushing to each says, where the Hub must answer within seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([answered, token, *repos]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        errors = self._errors.read_text()
        assert answer, errors
        assert not token or token not in answer + errors
        return json.loads(answer)


@pytest.fixture(scope="module")
def pushing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    with running_hub() as hub:
        pusher = Pusher(hub, tmp_path_factory.mktemp("pusher"))
        yield pusher
        pusher.process.communicate(timeout=60)


@pytest.fixture
def pusher(pushing: Pusher) -> Pusher:
    pushing.hub.forget()
    return pushing


def test_what_will_not_pass_is_said_once_and_with_the_remedy(pusher: Pusher) -> None:
    hub = pusher.hub
    said = {
        "bad": pusher.attempts("hf_notATokenAtAll", "org/name"),
        "none": pusher.attempts(None, "org/name"),
        "reader": pusher.attempts(READER, "org/name"),
    }
    assert "(401)" in said["bad"]["org/name"]
    assert "hf auth login" in said["bad"]["org/name"]
    assert "(401)" in said["none"]["org/name"]
    assert "(403)" in said["reader"]["org/name"]
    assert "may write" in said["reader"]["org/name"]
    assert not hub.repositories
    assert hub.count("POST", "/api/repos/create") == 3


def test_what_may_pass_is_tried_again_and_given_up_in_the_end(pusher: Pusher) -> None:
    hub = pusher.hub
    hub.fail("POST", "^/api/models/org/once/commit/", 503, times=1)
    hub.fail("POST", "^/api/models/org/dropped/commit/", DROP, times=1)
    hub.fail("POST", "^/api/models/org/down/commit/", 500)
    hub.fail("POST", "^/api/models/org/busy/commit/", 429)
    hub.fail("POST", "^/api/models/org/odd/commit/", 418)
    names = ("once", "dropped", "down", "busy", "odd")
    said = pusher.attempts(WRITER, *(f"org/{name}" for name in names))
    assert said["org/once"] == said["org/dropped"] == "pushed"
    assert "could not be reached" in said["org/down"]
    assert "(429)" in said["org/busy"]
    assert "(418)" in said["org/odd"]
    assert hub.count("POST", "org/odd/commit") == 1
    for name in ("down", "busy"):
        assert hub.count("POST", f"org/{name}/commit") == 3
        assert len(hub.repositories[f"models/org/{name}"].commits) == 1


def test_a_hub_that_never_answers_is_given_up(pusher: Pusher) -> None:
    hub = pusher.hub
    hub.fail("POST", "^/api/repos/create", SILENCE, times=3)
    hub.fail("GET", "^/api/models/org/reading", SILENCE)
    hub.fail("POST", "^/api/models/org/writing/commit/", SILENCE)
    hub.fail("POST", "^/api/models/org/once/commit/", SILENCE, times=1)
    silent = [f"org/{name}" for name in ("made", "reading", "writing")]
    said = pusher.attempts(WRITER, *silent, "org/once", answered=1)
    assert said.pop("org/once") == "pushed"
    for name, sentence in said.items():
        assert f"must answer for {name} within 1 seconds, and did not" in sentence
        assert "timed out" in sentence
    assert hub.count("POST", "org/writing/commit") == 3


def test_what_answers_in_place_of_the_hub_is_tried_again_and_named(pusher: Pusher) -> None:
    hub = pusher.hub
    hub.fail("POST", "^/api/repos/create", 200, times=3, content=PAGE)
    hub.fail("POST", "^/api/repos/create", 200, times=3, content=b"{}")
    places = {
        "org/asking": ("POST", "^/api/models/org/asking/preupload/"),
        "org/reading": ("GET", "^/api/models/org/reading"),
        "org/writing": ("POST", "^/api/models/org/writing/commit/"),
    }
    names = ["org/made", "org/made-otherwise"]
    for repo, (method, path) in places.items():
        for what, content in {
            "page": PAGE,
            "empty": b"",
            "keys": b"{}",
            "null": b"null",
        }.items():
            name = f"{repo}-{what}"
            hub.fail(method, path.replace(repo, name), 200, content=content)
            names.append(name)
    hub.fail("POST", "^/api/models/org/once/commit/", 200, times=1, content=PAGE)
    said = pusher.attempts(WRITER, *names, "org/once")
    assert said.pop("org/once") == "pushed"
    for name, sentence in said.items():
        begin = f"{hub.endpoint} must answer for {name} as the Hub does, and did not, asked 3"
        assert sentence.startswith(begin), sentence
        assert sentence.endswith("or check HF_ENDPOINT and HTTPS_PROXY.")
        assert "\n" not in sentence
        assert "log-in page" in sentence
    assert hub.count("POST", "org/writing-page/commit/") == 3
    assert hub.count("POST", "org/asking-keys/preupload/") == 3


def test_a_commit_that_another_overtakes_is_tried_again(pusher: Pusher) -> None:
    hub = pusher.hub
    for status in (409, 412):
        hub.fail("POST", f"^/api/models/org/once-{status}/commit/", status, times=1)
        hub.fail("POST", f"^/api/models/org/always-{status}/commit/", status)
    names = [f"org/{when}-{status}" for when in ("once", "always") for status in (409, 412)]
    said = pusher.attempts(WRITER, *names)
    for status in (409, 412):
        assert said[f"org/once-{status}"] == "pushed"
        sentence = said[f"org/always-{status}"]
        assert sentence.startswith(
            f"a commit to org/always-{status} must follow its newest one, and another came "
            f"first ({status}), tried 3 times; push again when nothing else does: "
        )
        assert f"fault {status}" in sentence
        assert "developer.mozilla.org" not in sentence
        assert hub.count("POST", f"org/always-{status}/commit") == 3


def test_what_the_hub_takes_in_no_form_is_said_once(pusher: Pusher) -> None:
    hub = pusher.hub
    hub.fail("POST", "^/api/models/org/large/commit/", 413, content=PAGE)
    metadata = b'{"errors": [{"message": "\\"license\\" must be one of those known"}]}'
    hub.fail("POST", "^/api/validate-yaml", 400, content=metadata)
    said = pusher.attempts(WRITER, "org/card")
    hub.faults.pop()
    said |= pusher.attempts(WRITER, "org/large")
    assert said["org/large"] == (
        "the Hub, or a proxy before it, takes no upload of this size for org/large (413); push "
        "from a network without the proxy, or less at once: no expander, no ONNX."
    )
    assert said["org/card"] == (
        "the Hub refuses org/card (400): Invalid metadata in README.md. "
        '- "license" must be one of those known'
    )
    assert hub.count("POST", "org/large/commit") == 1
    assert hub.count("POST", "/api/validate-yaml") == 2  # once for each


# A run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "jane_does_images")


def test_a_run_that_may_not_push_stops_before_it_trains(images: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        flags = [f"--output_dir={tmp_path / 'run'}", f"--dataset_name={images}", "--max_steps=2"]
        command = [sys.executable, "scripts/pretrain.py", *SMALL, *flags]
        done = run(
            [*command, "--push_to_hub=true", "--hub_model_id=org/name"],
            **online(hub, tmp_path, READER),
        )
        assert done.returncode != 0
        assert "error: pushing to org/name needs an access token that may write" in done.stderr
        assert "Traceback" not in done.stderr.split("error:")[0]
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_push_cut_off_midway_leaves_the_earlier_revision_and_says_how_to_retry(
    images: Path, tmp_path: Path
) -> None:
    with running_hub() as hub:
        online_here = online(hub, tmp_path / "home")
        flags = [f"--output_dir={tmp_path / 'run'}", f"--dataset_name={images}", "--max_steps=2"]
        command = [sys.executable, "scripts/pretrain.py", *SMALL, *flags]
        command += ["--push_to_hub=true", "--hub_model_id=org/name", "--hub_private=true"]
        first = run([*command, "--save_steps=1"], **online_here)
        assert first.returncode == 0, first.stderr
        repository = hub.repositories["models/org/name"]
        earlier = dict(repository.files())
        assert repository.private
        assert len(repository.commits) == 2
        assert earlier.keys() == {
            "README.md", "config.json", "model.safetensors", "pictures/loss_terms.png",
            "pictures/retrievals.png", "pictures/singular_values.png",
        }  # fmt: skip
        card = earlier["README.md"].decode()
        assert 'AutoModel.from_pretrained("org/name")' in card
        assert "hf-hub:org/name" in card

        hub.fail("POST", "^/api/models/org/name/commit/", DROP)
        again = [*command, "--resume=never", "--seed=1"]
        second = run(again, **online_here)
        assert second.returncode != 0
        assert repository.files() == earlier
        retry = second.stderr.split("Push it again with")[1].split("\n")[1].split()
        assert retry[1:] == [
            "scripts/publish.py", str(tmp_path / "run"), "--repo_id", "org/name", "--private",
        ]  # fmt: skip
        hub.faults.clear()
        hub.fail("POST", "^/api/models/org/name/commit/", 200, content=PAGE)
        behind = run(retry, **online_here)
        assert behind.returncode == 1
        assert behind.stderr.splitlines()[-1].startswith(f"error: {hub.endpoint} must answer for")
        assert "Traceback" not in behind.stderr
        hub.faults.clear()
        third = run(retry, **online_here)
        assert third.returncode == 0, third.stderr
        assert repository.files()["model.safetensors"] != earlier["model.safetensors"]
        assert repository.files().keys() == earlier.keys()
        for result in (first, second, third):
            assert WRITER not in result.stdout + result.stderr
