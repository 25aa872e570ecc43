"""The report as a real browser shows it."""

from __future__ import annotations

import html
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import binary
from reports import FACTS, HOSTILE, MEASUREMENTS, example, write
from workflow import LIMIT

from vicreg_hf.evaluation.report.maps import Maps

FRAME = """<title></title>
<iframe src="report.html" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
onload = () => {{
    const page = document.querySelector('iframe').contentWindow;
    document.title = JSON.stringify(page.eval({question}));
}}
</script>"""
"""Shows the report as wide as is asked, and becomes what a question to it answers."""

QUESTION = """
const all = query => [...document.querySelectorAll(query)];
const style = element => getComputedStyle(element);
({
    width: innerWidth,
    needed: document.documentElement.scrollWidth,
    // what is wider than the page lies in a box that scrolls
    beyond: all('main *').filter(
        e => !e.closest('.box, svg') && e.getBoundingClientRect().right > innerWidth + 1
    ).map(e => e.outerHTML.slice(0, 80)),
    overflow: style(document.querySelector('.box')).overflowX,
    images: document.images.length,
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length,
    figures: all('figure > svg').length,
    flat: all('figure > svg').filter(
        s => s.getBoundingClientRect().height < 100 || s.getBBox().width < 100).length,
    pairs: all('.pairs img').map(e => e.getBoundingClientRect().height),
    pwned: typeof window.pwned,
    page: style(document.body).backgroundColor,
    text: style(document.body).color,
    drawn: style(document.querySelector('figure > svg text')).fill,
    colours: [...new Set(all('main *').filter(
        e => !e.closest('.matrix td') && e.textContent.trim()
            && (!e.closest('svg') || e.matches('text'))
    ).map(e => style(e)[e.closest('svg') ? 'fill' : 'color']))],
    cells: all('.matrix tbody td').filter(e => e.textContent).map(
        e => [style(e).color, style(e).backgroundColor, e.textContent]),
})
"""


@pytest.fixture(scope="module")
def browser() -> str:
    return binary()


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
    pictures, maps = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.rand(1, 4, 4, 8)
    given["maps"] = Maps(pictures, maps, (pictures, pictures), (maps, maps))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path, **given)
    return path


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


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_the_page_fits_its_window_and_is_readable_on_light_and_dark(
    browser: str, report: Path, width: int, dark: bool, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    frame = report.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, question=json.dumps(QUESTION)))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path}",
            f"--blink-settings=preferredColorScheme={int(not dark)}", frame.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=LIMIT,
    )  # fmt: skip
    title = re.search(r"<title>(.+)</title>", done.stdout)
    assert title is not None, done.stderr
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    assert found["width"] == width
    assert found["needed"] <= width
    assert found["beyond"] == []
    assert found["overflow"] == "auto"
    assert found["images"] > 60
    assert found["figures"] == 4
    assert found["broken"] == found["flat"] == 0
    assert max(found["pairs"]) < 1.2 * min(found["pairs"])  # views are no smaller than the image
    assert found["pwned"] == "undefined"
    page = found["page"]
    assert (contrast("rgb(255, 255, 255)", page, page) > 15) is dark
    colours = [colour for colour in found["colours"] if colour != "none"]
    assert len(colours) >= 3
    assert min(contrast(colour, page, page) for colour in colours) >= 4.5
    assert found["drawn"] == found["text"]
    # the matrix of many classes is a picture
    shares = 10 if "few classes" in request.node.name else 0
    assert len({share for *_, share in found["cells"]}) == shares
    assert all(contrast(text, behind, page) >= 4.5 for text, behind, _ in found["cells"])
