"""Images that cannot be used, counted over processes and runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.columns.base import BadImage


@pytest.mark.parametrize(
    ("num_images", "seen", "most"),
    [
        (50_000, 200, 50),  # few seen: judged as if of a thousand
        (50_000, 40_000, 2000),
        (50_000, 10**9, 2500),  # many epochs
        (40, 16, 2),
        (None, 4000, 200),
    ],
)
def test_the_share_is_of_the_images_seen(num_images: int | None, seen: int, most: int) -> None:
    for count in (most, most + 1):
        images = BadImages(num_images, 0.05, None)
        images.add(BadImage(row, None, "empty.") for row in range(count))
        with pytest.raises(ValueError, match=f"got {count} of") if count > most else nullcontext():
            images.agree(seen=seen, say=lambda _: None)


@pytest.mark.parametrize(
    ("num_images", "seen", "most"),
    [(None, 16, 50), (80, 16, 4), (80, 950, 50), (None, 19_000, 1000)],  # also the bad are seen
)
def test_images_without_rows_all_count(num_images: int | None, seen: int, most: int) -> None:
    for count in (most, most + 1):
        images = BadImages(num_images, 0.05, None)
        images.add([BadImage(None, None, "empty.", 0)] * count)
        with pytest.raises(ValueError, match=f"got {count} of") if count > most else nullcontext():
            images.agree(seen=seen, say=lambda _: None)


def test_processes_agree_and_what_is_found_meanwhile_is_told_the_next_time() -> None:
    bad = BadImages(100, 0.5, None)
    bad.add([BadImage(3, None, "empty.")])

    def gather(own: list[BadImage]) -> list[BadImage]:
        bad.add([BadImage(4, None, "cut.")])  # by the thread that makes the next batches
        return [*own, BadImage(7, None, "cut."), BadImage(3, None, "empty.")]

    bad.agree(gather, say=lambda _: None)
    assert {image.row for image in bad.found} == {3, 7}
    bad.agree(say=lambda _: None)
    assert {image.row for image in bad.found} == {3, 4, 7}


def test_a_resumed_run_knows_the_bad_images_of_before(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first = BadImages(100, 0.5, path)
    first.add([BadImage(3, None, "empty."), BadImage(4, "x.png", "cut.")])
    first.agree(say=lambda _: None)
    with path.open("a") as file:
        file.write('{"row": 5, "pa')  # torn by a kill
    again = BadImages(100, 0.5, path)
    again.recall()
    assert again.found == first.found
    again.forget()
    assert not path.exists()
