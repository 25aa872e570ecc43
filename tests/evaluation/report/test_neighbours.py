"""The report's test images beside their nearest neighbours."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reports import NAMES, Page, decoded, example, gallery, random, written
from torch import Tensor

from vicreg_hf.evaluation.report.gallery import thumbnail
from vicreg_hf.evaluation.report.neighbours import NEIGHBOURS, QUERIES, neighbours


def queries(page: Page) -> list[dict[str, Any]]:
    """The lines at each query and at its neighbours, and their pictures."""
    found = []
    for query in page.html.split('<div class="case">')[1:]:
        image, _, rest = query.partition('<ol class="near">')
        near = rest.partition("</ol>")[0].split("<li")[1:]
        clean = [re.sub(r"\s*<[^>]+>\s*", "|", f"<li{text}").split("|") for text in (image, *near)]
        lines = [[line.strip() for line in part if line.strip()] for part in clean]
        uris = re.findall(r'src="([^"]+)"', query.partition("</ol>")[0])
        found.append({"query": lines[0], "near": lines[1:], "uris": uris})
    return found


def shade(value: int) -> Tensor:
    return torch.full((3, 8, 8), value, dtype=torch.uint8)


def test_neighbours_are_the_nearest_and_marked_by_class(tmp_path: Path) -> None:
    given = example(test_images=28)
    # an image says which row it is
    train = replace(given["train"], read=lambda rows: [shade(row) for row in rows])
    test = replace(given["test"], read=lambda rows: [shade(200 - row) for row in rows])
    page = written(tmp_path, train=train, test=test, class_names=NAMES)
    unit = [g.features.numpy() / np.linalg.norm(g.features, axis=1)[:, None] for g in (train, test)]
    similarity = unit[1] @ unit[0].T
    right = 0
    for row in range(28):
        order = np.argsort(-similarity[row])[:20]
        votes = np.zeros(4)
        np.add.at(votes, train.labels[order], np.exp(similarity[row, order] / 0.07))
        right += int(votes.argmax() == test.labels[row])
    kinds = re.findall(r"Where 20-NN is (right|wrong): (\d+) of 28", page.html)
    assert kinds == [("right", str(right)), ("wrong", str(28 - right))]
    shown = queries(page)
    assert len(shown) == QUERIES + min(QUERIES, 28 - right)
    for place, query in enumerate(shown):
        values = [np.array(Image.open(io.BytesIO(decoded(uri))))[0, 0, 0] for uri in query["uris"]]
        row = 200 - int(values[0])
        nearest = np.argsort(-similarity[row])[:NEIGHBOURS]
        assert values[1:] == nearest.tolist()
        true = int(test.labels[row])
        assert query["near"] == [
            [("✓ " if same else "✗ ").strip(), NAMES[train.labels[index]],
             f"{similarity[row, index]:.2f}"]
            for index in nearest
            for same in [int(train.labels[index]) == true]
        ]  # fmt: skip
        mark = "✓" if place < QUERIES else "✗"
        assert query["query"][:2] == [NAMES[true], f"{mark} 20-NN:"]
        assert (query["query"][2] == NAMES[true]) is (mark == "✓")


def test_without_labels_neighbours_are_shown_unmarked(tmp_path: Path) -> None:
    both = gallery(random(20, 4), None, [shade(0)])
    page = written(tmp_path, train=both, test=both, class_names=())
    assert "Nearest neighbours" in page.text
    assert "Where" not in page.text
    assert "✓" not in page.html
    assert len(queries(page)) == QUERIES
    assert neighbours(gallery(random(0, 4)), both, seed=0) is None


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), (8, 8)), ((2, 30, 20), (20, 30)), ((3, 200, 400), (96, 48)),
        ((4, 96, 96), (96, 96)), ((9, 1, 500), (96, 1)),
    ],
)  # fmt: skip
def test_any_image_becomes_a_small_thumbnail(
    shape: tuple[int, int, int], size: tuple[int, int]
) -> None:
    image = torch.full(shape, 255, dtype=torch.uint8)
    image[0] = 90
    opened = Image.open(io.BytesIO(decoded(thumbnail(image).uri)))
    assert opened.size == size
    expected = (90, 255, 255) if shape[0] >= 3 else (90, 90, 90)
    assert opened.convert("RGB").getpixel((0, 0)) == expected
