"""The report as a real browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reports import FACTS, HOSTILE, MEASUREMENTS, example

from vicreg_hf.evaluation.report.report import write_report

START = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts a browser with pipes where it looks for them."""


class Browser:
    """Chromium, spoken to in its DevTools protocol over two pipes."""

    def __init__(self, binary: str, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", START, str(commands), str(answers), binary,
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
            ],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._buffer, self._session = b"", {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._answers, 65536)
            if not piece:
                raise EOFError("the browser ended.")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        command = {"id": 1, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while "id" not in (answer := self._message()):
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
            mobile=width < 500,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"no browser to open the report in: none of {', '.join(names)} is installed")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait(timeout=30)


@pytest.fixture(scope="module", params=[11, 60], ids=["few classes", "many classes"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = example(request.param, test_images=110)
    labels = given["test"].labels
    # accuracies of 0 to 1, so that cells of the matrix have every shade
    right = torch.arange(110) // 11 < labels
    given["predictions"] = {"a": torch.where(right, labels, (labels + 1) % request.param)}
    given["class_names"] = [*HOSTILE, *(f"class with a name {k}" for k in range(60))]
    given["title"] = "z" * 150
    given["facts"] = FACTS | {"a" * 80: "b" * 80}
    given["measurements"] = [replace(MEASUREMENTS[0], name="c" * 90, settings={"d": "e" * 200})]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, **given)
    return path


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_fits_its_window_and_its_pictures_load(
    browser: Browser, report: Path, width: int
) -> None:
    browser.open(report, width=width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # nothing is cut off either: what is wider than the page lies in a box that scrolls
    beyond = """[...document.querySelectorAll('main *')].filter(
        e => !e.closest('.box, svg') && e.getBoundingClientRect().right > innerWidth + 1
    ).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.evaluate(beyond) == []
    assert browser.evaluate("getComputedStyle(document.querySelector('.box')).overflowX") == "auto"
    assert browser.evaluate("document.images.length") > 60
    broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
    assert browser.evaluate(broken) == 0
    assert browser.evaluate("[...document.querySelectorAll('figure > svg')].length") == 4
    flat = """[...document.querySelectorAll('figure > svg')].filter(
        s => s.getBoundingClientRect().height < 100 || s.getBBox().width < 100).length"""
    assert browser.evaluate(flat) == 0
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert requests[0] == report.as_uri()
    assert [url for url in requests[1:] if not url.startswith("data:")] == []
    assert [event for event in browser.events if event.get("method") == "Log.entryAdded"] == []
    assert browser.evaluate("typeof window.pwned") == "undefined"


def contrast(text: str, behind: str, page: str) -> float:
    """The contrast of "rgb(r, g, b)" as WCAG 2.2 defines it, over a colour that may let the page's
    through.
    """
    colours = [np.array(re.findall(r"[\d.]+", c), dtype=float) for c in (text, behind, page)]
    alpha = colours[1][3] if len(colours[1]) == 4 else 1.0
    mixed = alpha * colours[1][:3] + (1 - alpha) * colours[2][:3]
    channels = np.array([colours[0][:3], mixed.round()]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    low, light = np.sort(linear @ [0.2126, 0.7152, 0.0722])
    return float((light + 0.05) / (low + 0.05))


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_numbers_are_readable_on_light_and_dark(
    browser: Browser, report: Path, dark: bool, request: pytest.FixtureRequest
) -> None:
    browser.open(report, width=1280, dark=dark)
    page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast("rgb(255, 255, 255)", page, page) > 15) is dark
    colours = """[...new Set([...document.querySelectorAll('main *')].filter(
        e => !e.closest('.matrix td') && e.textContent.trim()
            && (!e.closest('svg') || e.matches('text'))
    ).map(e => getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']))]"""
    found = [colour for colour in browser.evaluate(colours) if colour != "none"]
    assert len(found) >= 3
    assert min(contrast(colour, page, page) for colour in found) >= 4.5
    filled = "getComputedStyle(document.querySelector('figure > svg text')).fill"
    assert browser.evaluate(filled) == browser.evaluate("getComputedStyle(document.body).color")
    cells = browser.evaluate("""[...document.querySelectorAll('.matrix tbody td')].filter(
        e => e.textContent).map(e => [getComputedStyle(e).color,
            getComputedStyle(e).backgroundColor, e.textContent])""")
    # the matrix of many classes is a picture
    assert len({share for *_, share in cells}) == (10 if "few classes" in request.node.name else 0)
    assert all(contrast(text, behind, page) >= 4.5 for text, behind, _ in cells)
