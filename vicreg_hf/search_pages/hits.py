"""New images beside those that were found for them, as an HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.report.gallery import STYLES, Inline, thumbnail
from vicreg_hf.features.pictures import open_pictures, picture
from vicreg_hf.features.search import Neighbour, Neighbours, Search
from vicreg_hf.hub.record import impersonal
from vicreg_hf.runtime.console import warn
from vicreg_hf.runtime.files import replacing
from vicreg_hf.search_pages.app import THUMBNAIL, Case, Hit, environment, note_on


def pictures_of(search: Search) -> dict[str, ImageSplit]:
    """The images that were searched; none of them, with a warning, where they cannot be opened."""
    try:
        return open_pictures(search.record, search.encoder)
    except (ValueError, OSError) as error:
        warn(f"the images found are not shown: {error}")
        return {}


def cases(
    search: Search, found: Sequence[Neighbours], pictures: Mapping[str, ImageSplit]
) -> list[Case]:
    """What was found as pages show it.

    Args:
        pictures: the splits whose images can be shown.
    """
    shown = []
    queries = search.queries([one.query for one in found])
    for one, query in zip(found, queries.try_each(range(len(found))), strict=True):
        own = None if isinstance(query, BadImage) else thumbnail(query.content, THUMBNAIL)
        hits = [
            Hit(near.similarity, near.split, near.row, _name(near), near.label,
                _thumbnail(pictures, near))
            for near in one.nearest
        ]  # fmt: skip
        shown.append(Case(Path(one.query).name, own, hits, note_on(one.query)))
    return shown


def _name(near: Neighbour) -> str:
    by_row = near.image_id == str(near.row)
    return f"{near.split}, row {near.row}" if by_row else near.image_id


def _thumbnail(pictures: Mapping[str, ImageSplit], near: Neighbour) -> Inline | None:
    image = picture(pictures, near.split, near.row)
    return None if image is None else thumbnail(image, THUMBNAIL)


def describe(search: Search) -> tuple[str, str]:
    """A title of a page that searches these features, and a sentence on how it does."""
    data, model = (
        str(impersonal(search.record.get(key) or unknown))
        for key, unknown in (("dataset_name", "the data set"), ("model", "the encoder"))
    )
    splits = ", ".join(dict.fromkeys(part.split for part in search.files))
    about = (
        f"By cosine similarity of features of the encoder {model}, among "
        f"{search.num_rows:,} images ({splits})."
    )
    return f"Most similar images in {data}", about


def write_hits(
    path: Path, search: Search, found: Sequence[Neighbours], pictures: Mapping[str, ImageSplit]
) -> None:
    """Write a page of new images beside those found for them; it holds small pictures of both.

    Args:
        path: of the HTML file; an earlier one is replaced.
        pictures: the splits whose images can be shown.

    Raises:
        OSError: the file cannot be written.
    """
    title, about = describe(search)
    shown = cases(search, found, pictures)
    page = environment(STYLES).get_template("hits.html.jinja").render(
        title=title, about=about, cases=shown, pictures=bool(pictures),
        labelled=any(case.classes for case in shown),
    )  # fmt: skip
    with replacing(path) as aside:
        # half of a surrogate pair, which no encoding has, must not cost the page
        aside.write_text(page, encoding="utf-8", errors="replace", newline="\n")
