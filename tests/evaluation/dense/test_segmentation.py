"""Segmentation with a frozen encoder, as users run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measuring import arguments, strict
from PIL import Image
from reports import Page
from scenes import VOID, png, scene, write_map_encoder, write_scenes
from sklearn import metrics
from workflow import ROOT

from vicreg_hf.data.columns.image_files import ImageError
from vicreg_hf.evaluation.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_core", "own_cache")
METRICS: Any = metrics
SIZES = {"train": 12, "test": 5}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_map_encoder(tmp_path_factory.mktemp("encoder") / "untrained")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", SIZES)


def run(model: Path, data: Path, folder: Path, **given: Any) -> dict[str, Any]:
    settings = {"ignore_index": str(VOID), "epochs": 6, "num_resamples": 100, "baselines": False}
    args = arguments(model, data, folder, **({"protocols": "segmentation"} | settings | given))
    return evaluate(args, say=lambda _: None)


def test_overlap_is_that_of_the_predicted_masks_and_stands_in_results_and_report(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("sky\nground\nhouse\n", encoding="utf-8")
    given = {"image_size": "64x96", "mask_names": str(names), "baselines": True}
    results = run(encoder, data, tmp_path, save_masks=str(tmp_path / "masks"), **given)
    miou, accuracy = results["results"]
    assert (miou["name"], miou["num_images"]) == ("segmentation mIoU", 5)
    assert miou["settings"]["map"] == "8x12"
    assert miou["settings"]["learning_rate"] in [
        t["learning_rate"] for t in miou["details"]["tried"]
    ]
    predicted = [np.array(Image.open(tmp_path / "masks" / f"{row:06d}.png")) for row in range(5)]
    truth = [scene(12 + row)[1] for row in range(5)]
    known = np.stack(truth) != VOID
    y, y_hat = np.stack(truth)[known], np.stack(predicted)[known]
    each: Any = METRICS.jaccard_score(y, y_hat, average=None)
    assert miou["value"] == pytest.approx(each.mean())
    assert accuracy["value"] == pytest.approx((y == y_hat).mean())
    assert each.mean() > 0.3
    assert miou["low"] < miou["value"] < miou["high"]
    classes = miou["details"]["classes"]
    assert [one["iou"] for one in classes.values()] == pytest.approx(each.tolist())
    assert all(one["low"] <= one["iou"] <= one["high"] for one in classes.values())
    assert set(results["baselines"]) == {"raw pixels", "untrained"}
    stored = strict(tmp_path / "out" / "results.json")
    assert stored["verdict"].startswith("untrained: segmentation mIoU ")
    page = Page(tmp_path / "out" / "report.html")
    assert all(word in page.text for word in ("Segmentation", "sky", "ground", "house", "worst"))
    pictures = page.values("img", "alt")
    assert sum("Predicted classes" in alt for alt in pictures) == 4
    assert pictures.count("Its feature map in colours") == 4
    assert sum("lines between positions" in alt for alt in pictures) == 4


def test_the_same_seed_gives_the_same_bits_and_folders_the_same_as_columns(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    images, masks, start = tmp_path / "images", tmp_path / "masks", 0
    for split, size in SIZES.items():
        for place in (images / split, masks / split):
            place.mkdir(parents=True)
        for k in range(size):
            image, classes = scene(start + k)
            (images / split / f"{k:03d}.png").write_bytes(png(image))
            palette = Image.fromarray(classes).convert("P")
            palette.putpalette(range(256) if k % 2 else list(range(255, -1, -1)))
            palette = Image.fromarray(classes, mode="L") if k == 0 else palette
            (masks / split / f"{k:03d}.png").write_bytes(
                png(classes.astype(np.uint16)) if k == 1 else png(palette)
            )
        start += size
    column = run(encoder, data, tmp_path / "a")["results"]
    folder = run(encoder, images, tmp_path / "b", mask_dir=str(masks))["results"]
    assert column == folder
    (masks / "test" / "004.png").unlink()
    with pytest.raises(ValueError, match=r"no test/004\.png for row 4 of images \(test\)"):
        run(encoder, images, tmp_path / "b", mask_dir=str(masks))


def colours(masks: list[bytes]) -> None:
    masks[3] = png(scene(3)[0])


def jpeg(masks: list[bytes]) -> None:
    masks[3] = png(scene(3)[1], "JPEG")


def small(masks: list[bytes]) -> None:
    masks[3] = png(scene(3)[1][::2, ::2])


def one_class(masks: list[bytes]) -> None:
    masks[:] = [png(np.full((32, 48), 255 * (k % 2), np.uint8)) for k in range(len(masks))]


def no_class(masks: list[bytes]) -> None:
    masks[:] = [png(np.full((32, 48), 255, np.uint8))] * len(masks)


def half_void(masks: list[bytes]) -> None:
    masks[2:] = [png(np.full((32, 48), 255, np.uint8))] * 2


def unknown(masks: list[bytes]) -> None:
    masks[3] = png(np.full((32, 48), 9, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "given", "sentence"),
    [
        (colours, {}, "row 3 of bad (train), column mask has pixels of RGB; save it in gray"),
        (jpeg, {}, "row 3 of bad (train), column mask is a JPEG, whose compression"),
        (small, {}, "has 16 x 24, its image 32 x 48; resize it by nearest neighbour."),
        (one_class, {}, "needs at least two classes in the masks of bad (train)"),
        (no_class, {}, "needs at least two classes in the masks of bad (train)"),
        (
            half_void,
            {"train_split": "train[:2]", "eval_split": "train[2:]"},
            "needs a class in the masks of bad (train[2:]), got none besides void (7, 255)",
        ),
        (unknown, {"mask_names": "names.json"}, "or void (7, 255), got 9 in row 3 of bad (train)"),
        (None, {"mask_names": "twice.txt"}, "must name each class once, got 'sky' for 0 and 2"),
        (None, {"mask_names": "absent.txt"}, "mask_names must be a text file"),
        (None, {"image_column": "mask", "mask_column": "mask"}, "mask_column must be another"),
        (None, {"mask_column": "masks"}, "mask_column must name a column of images, got 'masks'"),
        (None, {"image_size": "64,96"}, "image_size must be a side in pixels"),
        (None, {"ignore_index": "void"}, "ignore_index must be numbers from 0"),
        (None, {"protocols": "collapse"}, "ignore_index is a setting of the protocol segmentation"),
    ],
)
def test_masks_that_cannot_be_are_refused(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    spoil: Any, given: dict[str, Any], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("names.json").write_text('{"0": "sky", "1": "ground", "2": "house"}')
    Path("twice.txt").write_text("sky\nground\nsky")
    bad = write_scenes(Path("bad"), {"train": 4, "test": 2}, spoil)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(encoder, bad, tmp_path, **given)
    assert sentence in str(error.value)
    assert not (tmp_path / "cache").exists()  # nothing was encoded


def test_unreadable_masks_are_left_out_unless_they_are_many(encoder: Path, tmp_path: Path) -> None:
    def spoil(masks: list[Any]) -> None:
        masks[1] = b"torn"

    data = write_scenes(tmp_path / "data", {"train": 6, "test": 2}, spoil)
    with pytest.raises(ImageError, match="max_bad_fraction"):
        run(encoder, data, tmp_path)
    results = run(encoder, data, tmp_path, max_bad_fraction=0.2, lr_head=0.1)
    assert results["results"][0]["num_images"] == 2


def test_an_encoder_without_a_map_is_refused(data: Path, tmp_path: Path) -> None:
    flat = write_map_encoder(tmp_path / "flat", architecture="pit_ti_224")
    with pytest.raises(ValueError, match="the backbone must have a feature map"):
        run(flat, data, tmp_path)
    fixed = write_map_encoder(tmp_path / "fixed", architecture="test_vit")
    with pytest.raises(ValueError, match="must take images of 5 x 5 pixels"):
        run(fixed, data, tmp_path, image_size="5")


@pytest.mark.slow
def test_street_scenes_are_told_apart_beyond_their_pixels(tmp_path: Path) -> None:
    place = ROOT.parent / "shared" / "data"
    if not (place / "camvid").is_dir():
        pytest.skip("needs ../shared/data/camvid, which is not here")
    results = run(
        place / "efficientnet_lite0", place / "camvid", tmp_path, ignore_index="11",
        image_size="128", train_split="train[:40]", eval_split="test[:30]", baselines=True,
        epochs=30,
    )  # fmt: skip
    found = results["results"][0]
    assert found["low"] > results["baselines"]["raw pixels"]["value"]
