"""The page that search writes: what it shows, of which data, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from browser import tab
from extracting import extract, write_encoder, write_folder
from hub import connected, running_hub
from PIL import Image
from reports import HOSTILE, Page, decoded
from uploads import UNUSABLE, USABLE, write_uploads
from workflow import write_images

from vicreg_hf.commands.search import main
from vicreg_hf.features.search import nearest_images, open_search
from vicreg_hf.hub.api import open_repository, push_files, visible_files
from vicreg_hf.search_pages.app import UnusableError
from vicreg_hf.search_pages.serve import finder

pytestmark = pytest.mark.usefixtures("own_cache")
QUERY = "<img src=x onerror='window.pwned = 1'>.jpg"
CLASS = HOSTILE[0].replace("/", "")
GONE = "The images of the data set could not be opened again"
LOOK = """
const all = query => [...document.querySelectorAll(query)];
({
    width: document.documentElement.scrollWidth,
    beyond: all('main *').filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
    images: document.images.length,
    broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).length,
    columns: new Set(all('.near > li').map(e => e.getBoundingClientRect().x)).size,
    beside: all('.near')[0].getBoundingClientRect().x
        > all('.query')[0].getBoundingClientRect().right,
    pwned: typeof window.pwned,
    colour: getComputedStyle(document.body).backgroundColor,
})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of which a class has a hostile name, a query of one, and features of them."""
    place = tmp_path_factory.mktemp("hits")
    photos = write_folder(place / "photos")
    for split in ("train", "test"):
        (photos / split / "dog").rename(photos / split / CLASS)
    told = Image.Exif()
    told[0x010E] = "MARKexif"
    with Image.open(photos / "train" / CLASS / "00.png") as image:
        image.resize((240, 160)).save(place / QUERY, exif=told, comment=b"MARKcomment")
    extract(write_encoder(place / "encoder"), photos, place / "features")
    return place


def written(features: Path, query: Path, page: Path, *more: str) -> Page:
    main(["--features", str(features), "--query", str(query), "--html", str(page), *more])
    return Page(page)


def shown(page: Page) -> list[tuple[str, int]]:
    """The splits and the rows of the images found, in the order of the page."""
    found = re.findall(r'<li class="\w+" data-split="(\w+)" data-row="(\d+)"', page.html)
    return [(split, int(row)) for split, row in found]


def test_a_page_shows_what_was_found_in_order_and_nothing_of_files_but_pixels(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = written(place / "features", place / QUERY, tmp_path / "hits.html", "-k", "5")
    assert f"Written: {tmp_path / 'hits.html'}" in capsys.readouterr().out
    (found,) = nearest_images(place / "features", [place / QUERY], k=5)
    assert shown(page) == [(near.split, near.row) for near in found.nearest]
    for near in found.nearest:
        assert near.image_id in page.text
        assert f"{near.similarity:.3f} {near.label}" in page.text
    assert QUERY in page.text
    pictures = [decoded(uri) for uri in page.values("img", "src")]
    assert len(pictures) == 6
    assert "MARK" not in page.html
    assert not any(b"MARK" in content for content in pictures)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"(src|href)=.?(?!data:)[a-z]+:", page.html)
    assert GONE not in page.text
    assert str(tmp_path.parent) not in page.html  # a page may be given away


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_page_fits_its_window(place: Path, width: int, dark: bool, tmp_path: Path) -> None:
    with tab(tmp_path / "profile") as opened:
        written(place / "features", place / QUERY, tmp_path / "hits.html")
        opened.look(width, dark=dark)
        opened.open((tmp_path / "hits.html").as_uri())
        found = opened.ask(LOOK)
    assert found["width"] <= width
    assert (found["beyond"], found["broken"], found["images"]) == (0, 0, 9)
    assert found["columns"] == (4 if width == 1280 else 2)
    assert found["beside"]
    assert found["pwned"] == "undefined"
    assert (found["colour"] == "rgb(255, 255, 255)") is not dark


def test_without_the_images_or_with_others_their_names_are_shown(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = shutil.copytree(place / "features", tmp_path / "features")
    moved = place / "photos" / "test"
    moved.rename(tmp_path / "moved")
    try:
        page = written(features, place / QUERY, tmp_path / "hits.html")
    finally:
        (tmp_path / "moved").rename(moved)
    assert "warning: the images found are not shown: " in capsys.readouterr().err
    assert GONE in page.text
    assert len(page.values("img", "src")) == 1  # the query
    assert len(shown(page)) == 8
    record = json.loads((features / "extraction.json").read_text())
    record["splits"]["train"]["sha256"] = "0" * 64
    (features / "extraction.json").write_text(json.dumps(record))
    assert GONE in written(features, place / QUERY, tmp_path / "hits.html").text
    assert "has others by now; extract its features anew" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["parquet", "Hub"])
def test_images_in_tables_are_shown(
    where: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encoder = write_images(tmp_path / "data", rows=20), str(place / "encoder")
    with running_hub() as hub, connected(hub, tmp_path / "home"):
        name = str(data)
        if where == "Hub":
            name, resolved = "org/data", "/datasets/{repo_id}/resolve/{revision}/{path}"
            monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
            monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
            monkeypatch.setattr("datasets.config.HUB_DATASETS_URL", hub.endpoint + resolved)
            open_repository(name, repo_type="dataset")
            push_files(visible_files(data), name, commit_message="-", repo_type="dataset")
        extract(Path(encoder), Path(name), tmp_path / "features")
        page = written(tmp_path / "features", place / QUERY, tmp_path / "hits.html")
    assert len(page.values("img", "src")) == 9
    names = [f"{split}, row {row}" for split, row in shown(page)]
    assert len(names) == 8
    assert all(name in page.text for name in names)
    assert re.search(r"(dark|light) ?: \d of 8", page.text)


def test_unusual_uploads_are_searched_and_unusable_ones_refused(
    place: Path, tmp_path: Path
) -> None:
    find = finder(open_search(place / "features"), 8)
    with Image.open(place / "photos" / "train" / CLASS / "00.png") as image:
        uploads = write_uploads(tmp_path / "uploads", image)
    for name, note in USABLE.items():
        case = find(str(uploads / name))
        assert (case.name, case.note) == (name, note)
        assert len(case.hits) == 8
        assert all(hit.picture is not None for hit in case.hits)
    for name in UNUSABLE:
        with pytest.raises(UnusableError, match=r"^This file cannot be used: ") as refused:
            find(str(uploads / name))
        assert str(uploads) not in str(refused.value)


def test_what_cannot_be_written_is_said_before_anything_is_searched(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["--features", str(tmp_path / "none"), *words])
        return str(ended.value)

    query = ["--query", str(place / QUERY)]
    assert "html must be a file whose name ends with .html, got new.jpg" in refused(
        *query, "--html", "new.jpg"
    )
    assert "html must be in a folder that is there" in refused(
        *query, "--html", str(tmp_path / "absent" / "a.html")
    )
    assert "k must be positive" in refused(*query, "-k", "0")
    assert refused(*query, "--port", "80") == "error: port belongs to serve; leave it out."
    monkeypatch.setattr("vicreg_hf.commands.search.find_spec", lambda _: None)
    assert refused("--serve") == (
        "error: serve needs the package gradio; pip install 'vicreg-hf[demo]'."
    )
