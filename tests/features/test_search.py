"""Images that are nearest to new ones, among extracted features."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extracting import extract, load, write_encoder, write_folder
from families import trained

from vicreg_hf.features.search import exact_search, nearest_images

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, an encoder, and the features of the former by the latter."""
    place = tmp_path_factory.mktemp("search")
    extract(
        write_encoder(place / "encoder"), write_folder(place / "photos"), place / "features",
        bf16=True,
    )  # fmt: skip
    return place


def test_neighbours_are_those_of_a_product_of_all_features(place: Path, tmp_path: Path) -> None:
    tables = load(place / "features", tmp_path)
    rows: list[dict[str, Any]] = [row | {"split": s} for s in tables for row in tables[s]]
    unit = np.array([row["embedding"] for row in rows], np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    picked = [3, 7, 20]
    queries = [place / "photos" / rows[at]["image_id"] for at in picked]
    found = nearest_images(place / "features", queries, k=12)
    assert [one.query for one in found] == [str(query) for query in queries]
    for at, one in zip(picked, found, strict=True):
        expected = np.sort(unit @ unit[at])[::-1][:12]
        np.testing.assert_allclose([n.similarity for n in one.nearest], expected, atol=1e-3)
        assert rows[at]["image_id"] in {n.image_id for n in one.nearest if n.similarity > 0.999}
        assert all(n.image_id.split("/")[1] == n.label for n in one.nearest)
        assert str(one).count("\n") == 12
    (few,) = nearest_images(place / "features", queries[:1], k=5, split="test")
    assert [n.split for n in few.nearest] == ["test", "test"]  # which has no more


@pytest.mark.parametrize("package", ["faiss", "scikit-learn"])
def test_the_rows_found_are_those_of_a_product_in_double_precision(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "scikit-learn":
        monkeypatch.setattr("vicreg_hf.features.search.find_spec", lambda _: None)
    elif find_spec("faiss") is None:
        pytest.skip("faiss is not installed: pip install faiss-cpu")
    rng = np.random.default_rng(0)
    bank, wanted = rng.normal(size=(500, 24)), rng.normal(size=(7, 24))
    bank[40] = 3 * wanted[2]  # its length does not matter
    bank[0], bank[1] = 0, wanted[5]
    bank = bank.astype(np.float16)
    search = exact_search(bank)
    similarity, rows = search(wanted.astype(np.float32), 500)
    lengths = np.linalg.norm(bank.astype(np.float64), axis=1)
    product = bank / np.maximum(lengths, 1e-12)[:, None] @ wanted.T
    product = (product / np.linalg.norm(wanted, axis=1)).T
    expected = np.argsort(-product, axis=1)
    ordered = np.take_along_axis(product, expected, 1)
    np.testing.assert_allclose(similarity, ordered, atol=1e-5)  # 0 to the row of zeros
    # but for those whose similarities are alike to rounding
    apart = -np.diff(ordered, append=-3) > 1e-5
    apart &= -np.diff(ordered, prepend=3) > 1e-5
    assert (rows == expected)[apart].all()
    assert apart.mean() > 0.8
    assert (rows[2, 0], rows[5, 0]) == (40, 1)


def test_what_cannot_be_searched_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, page = (place / "photos" / "train" / "dog" / f"{n}.png" for n in ("00", "99"))
    features = shutil.copytree(place / "features", tmp_path / "features")

    def refused(sentence: str, *queries: Path, where: Path = features, **settings: Any) -> None:
        with pytest.raises(ValueError, match=sentence):
            nearest_images(where, queries or [photo], **settings)

    refused("features must be a directory that extract wrote", where=tmp_path)
    refused("k must be positive, got 0", k=0)
    refused(r"of which .* holds features \(test, train\), got 'val'", split="val")
    refused("query must be files of images, got '.*absent", tmp_path / "absent")
    refused("got '.*photos', which is a folder; give its files", place / "photos")
    refused("query must be images, and .*99.png cannot be used: .*; leave it out", photo, page)
    text = tmp_path / "text.jpg"
    text.write_text("text")
    refused("99.png cannot be used: .*; .*text.jpg .*; leave them out", page, photo, text)
    other = trained("test_vit")
    other.save_pretrained(tmp_path / "other", include_expander=False)
    refused("model must be the encoder of the features", model=str(tmp_path / "other"))
    first, second = sorted((features / "data").glob("train-*"))[:2]
    first.unlink()
    nearest_images(features, [photo])
    assert "warning: 3 of 4 files of train are there" in capsys.readouterr().err
    second.write_bytes(second.read_bytes()[:-9])
    refused(f"{second} must be whole, and is damaged")
    record = json.loads((features / "extraction.json").read_text())
    moved = record | {"model": str(tmp_path / "moved")}
    (features / "extraction.json").write_text(json.dumps(moved))
    refused("model must say where the encoder of the features is now")
    del record["model"]  # as earlier versions wrote it
    (features / "extraction.json").write_text(json.dumps(record))
    refused("which did not; give the encoder as model")
    extract(place / "encoder", place / "photos", features, bf16=True)  # which says it
    assert nearest_images(features, [photo], k=1)[0].nearest[0].similarity > 0.999
