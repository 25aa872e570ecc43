"""The page of search --serve and that of a Space, as processes that are really asked."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Tab, tab
from extracting import extract, write_encoder, write_folder
from hub import Hub, connected, online, running_hub
from huggingface_hub import HfApi, snapshot_download
from warm import Script, wait_for
from workflow import LIMIT, environment

from vicreg_hf.features.search import nearest_images
from vicreg_hf.search_pages.space import publish_space

pytestmark = [
    pytest.mark.slow, pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(
        find_spec("gradio") is None, reason="needs gradio: pip install 'vicreg-hf[demo]'"
    ),
]  # fmt: skip
STANDALONE = """
import runpy, sys
sys.modules["vicreg_hf"] = None  # which makes its import fail
runpy.run_path("app.py", run_name="__main__")
"""
FOUND = """[...document.querySelectorAll('.found li')].map(
    e => [e.dataset.split, Number(e.dataset.row), Number(e.dataset.similarity),
          e.querySelector('b')?.innerText, e.querySelector('img')?.naturalWidth])"""

BEYOND = """[...document.querySelectorAll('.found span')].filter(
    e => e.scrollWidth > e.clientWidth + 1).length"""
"""It counts the texts that are wider than the boxes that show them."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pages")
    photos = write_folder(place / "photos")
    extract(write_encoder(place / "encoder"), photos, place / "features")
    return place


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


@contextmanager
def local(place: Path, **variables: str) -> Iterator[str]:
    """Start the command; the address of its page."""
    words = ["vicreg_hf/commands/__main__.py", "search", "--features", str(place / "features")]
    script = Script([*words, "--serve"], **variables)
    try:
        wait_for(script, lambda: ADDRESS.search(script.printed[0]) is not None)
        found = ADDRESS.search(script.printed[0])
        assert found is not None
        yield found[0]
    finally:
        script.terminate()
        script.communicate(timeout=LIMIT)


@contextmanager
def space(place: Path, tmp_path: Path, hub: Hub, **variables: str) -> Iterator[str]:
    """Start a Space whose encoder is on the Hub; the address of its page."""
    with connected(hub, tmp_path / "home"):
        HfApi().create_repo("org/encoder")
        HfApi().upload_folder(repo_id="org/encoder", folder_path=place / "encoder")
        publish_space(place / "features", "org/find", model="org/encoder", publish_images=True)
        folder = snapshot_download("org/find", repo_type="space", local_dir=tmp_path / "space")
    variables |= online(hub, tmp_path / "other") | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", STANDALONE], cwd=folder, env=environment(**variables),
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            lines = map(ADDRESS.search, iter(process.stdout.readline, ""))
            yield next(found[0] for found in lines if found is not None)
        finally:
            process.terminate()


def answered(address: str, file: Path) -> str:
    """Send a file to the page as its own script does; the HTML that it answers."""
    with httpx.Client(base_url=f"{address}/gradio_api/", trust_env=False, timeout=LIMIT) as client:
        (path,) = client.post("upload", files={"files": (file.name, file.read_bytes())}).json()
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        event = client.post("call/find", json={"data": data}).json()["event_id"]
        answer = client.get(f"call/find/{event}").text
    return json.loads(re.findall(r"event: complete\ndata: (.*)", answer)[0])[0]


def dropped(page: Tab, file: Path) -> str:
    """Drop a file into the page, and wait for what it answers."""
    page.until("document.querySelector('#query input[type=file]') !== null")
    page.drop(file, "#query button")
    return page.until(
        "document.querySelector('.found .query, .refused') && "
        "document.querySelector('#answer').innerText"
    )


@pytest.mark.parametrize("kind", ["local", "space"])
def test_a_photograph_that_is_dropped_is_shown_beside_its_neighbours(
    kind: str, place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    query, uploads = place / "photos" / "train" / "cat" / "04.png", tmp_path / "uploads"
    uploads.mkdir()
    (expected,) = nearest_images(place / "features", [query])
    with (
        running_hub() as hub,
        socket.create_server(("127.0.0.1", 0)) as outside,
        ExitStack() as stack,
    ):
        # whoever wants to reach anything but this machine comes to this socket
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        own = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
        own |= {"NO_PROXY": "127.0.0.1,localhost", "TMPDIR": str(uploads)}
        shown = local(place, **own) if kind == "local" else space(place, tmp_path, hub, **own)
        address = stack.enter_context(shown)
        answer = answered(address, query)
        rows = re.findall(r'<li class="\w+" data-split="(\w+)" data-row="(\d+)"', answer)
        wanted = [(near.split, str(near.row)) for near in expected.nearest]
        assert len(rows) == 8
        assert len({*rows} & {*wanted}) >= 7  # but for one whose similarity is alike to rounding
        answer = answered(address, place / "photos" / "train" / "dog" / "99.png")  # is no image
        assert answer.startswith('<p class="refused" role="alert">This file cannot be used: ')
        page: Tab = request.getfixturevalue("browser")  # skips the rest where there is none
        page.requested.clear()
        page.look(1280)
        page.open(address)
        dropped(page, query)
        found = page.ask(FOUND)
        assert [line[2] for line in found] == pytest.approx(
            [near.similarity for near in expected.nearest], abs=2e-4
        )
        assert (found[0][0], found[0][1]) in {("train", 2), ("train", 3), ("train", 4)}
        known = {(near.split, near.row): near.label for near in expected.nearest}
        assert len({tuple(line[:2]) for line in found} & known.keys()) >= 7
        for split, row, _, label, width in found:
            assert known.get((split, row), label) == label
            assert width > 0
        page.look(390, dark=True)
        assert page.ask(BEYOND) == 0
        if kind == "local":  # what is dropped next takes the place of the first
            page.until("document.querySelector('#query input[type=file]') !== null")
            page.drop(place / "photos" / "train" / "dog" / "99.png", "#query button")  # is no image
            answer = page.until("document.querySelector('.refused')?.innerText")
            assert answer.startswith("This file cannot be used: ")
            assert page.ask(FOUND) == []
        asked = {urlsplit(url).netloc for url in page.requested if not url.startswith("data:")}
        assert asked == {urlsplit(address).netloc}
        outside.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody came
            outside.accept()
    if kind == "local":
        assert [*uploads.iterdir()] == []  # what was dropped is not kept
