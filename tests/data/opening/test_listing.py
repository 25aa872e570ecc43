"""What is left out of folders and zips is told of, and foreign spellings are read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from datasets import Dataset
from pictures import write, zipped

from vicreg_hf.data.opening.dataset import open_dataset
from vicreg_hf.data.opening.listing import counting_left_out
from vicreg_hf.data.splits import image_split

NFD = unicodedata.normalize("NFD", "Bäume")
SPELLINGS = {
    "backslashes": ([r"Train\oak\1.png", r"TRAIN\elm\2.png", r"Test\oak\3.png"], ["elm", "oak"]),
    "accents": (["train/Bäume/1.png", "train/elm/2.png", f"test/{NFD}/3.png"], ["Bäume", "elm"]),
    "capitals": (["train/oak/1.png", "train/elm/2.png", "test/OAK/3.png"], ["elm", "oak"]),
}


@pytest.mark.parametrize("in_zip", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(("names", "classes"), SPELLINGS.values(), ids=SPELLINGS)
def test_folders_are_read_as_other_systems_write_them(
    names: list[str], classes: list[str], in_zip: bool, tmp_path: Path
) -> None:
    place = write(tmp_path / "pictures", names)
    splits = open_dataset(str(zipped(place, tmp_path / "a.zip") if in_zip else place))
    assert {name: len(table) for name, table in splits.items()} == {"train": 2, "test": 1}
    assert splits["test"].features["label"].names == classes
    image_split(splits, "test", dataset_name="pictures").read([0])


TABLE = f"file_name,caption\nA\\{NFD}.PNG,{NFD}\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_are_read_as_other_systems_write_them(
    suffix: str, encoding: str, tmp_path: Path
) -> None:
    name = "Bäume"
    place = write(tmp_path, [f"a/{name}.png", "b/2.png", "B/2.PNG"])
    text = TABLE if suffix == "csv" else f'{{"file_name": "A/{NFD}.PNG", "caption": "{NFD}"}}\n'
    (place / f"metadata.{suffix}").write_bytes(text.encode(encoding))
    if encoding == "utf-16-le":  # without a mark
        with pytest.raises(ValueError, match=r"must be in UTF-8, so save it anew \(it holds zero"):
            open_dataset(str(place))
        return
    table = open_dataset(str(place))["train"]
    assert table["caption"][:] == [NFD]
    image_split({"train": table}, "train", dataset_name="pictures").read([0])


KNOWN = ["oak/1.png", "oak/2.png", "elm/3.png", "elm/4.png"]
LEFT_OUT = {
    "stray": (["5.png"], r"1 of 5 files in split train have no label, as .*5\.png is the first"),
    "system": (["oak/@eaDir/1.png"], r"taken for thumbnails or the system's .* 1 in all: .*@eaDir"),
    "endings": (
        ["5.jpg?w=1", "oak/6", "oak/7", "LICENSE", "notes.txt"],
        r"3 of 7 files in .* endings are not those of images: 2 without one, 1 \.jpg\?w=1;",
    ),
    "run": (
        ["run/config.yaml", "run/metrics.jsonl", "run/views/6.png"],
        r"that hold outputs of earlier runs are left out, 1 in all: .*run is the first",
    ),
    "nothing": (["notes.txt", "elm/3.json", "oak/.hidden/1.png", ".DS_Store"], ""),
}


@pytest.mark.parametrize(("names", "warning"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_one_line_tells_of_what_is_left_out(
    names: list[str], warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = open_dataset(str(write(tmp_path, [*KNOWN, *names])))["train"]
    assert len(table) == 5 if warning.startswith("1 of 5") else 4
    assert sorted(each for each in table["label"] if each is not None) == [0, 0, 1, 1]
    said = capsys.readouterr().err
    assert said.count("\n") == bool(warning)
    assert re.search(warning, said)


def test_what_is_left_out_is_counted_by_the_reason(tmp_path: Path) -> None:
    place = write(tmp_path / "split", [f"{s}/{n}" for s in ("train", "test") for n in KNOWN])
    write(place, ["7.png", "8.png", "oak/9.cr2"])
    zipped(write(tmp_path / "other", ["1.png"]), place / "more.zip")
    with counting_left_out() as found:
        assert {name: len(table) for name, table in open_dataset(str(place)).items()} == {
            "train": 4, "test": 4,
        }  # fmt: skip
    assert found == {
        "they are in no split": 2, "their endings are not those of images": 1,
        "zips are not read where other files lie beside them": 1,
    }  # fmt: skip
    (write(tmp_path / "named", KNOWN) / "metadata.csv").write_text("file_name\noak/1.png\n")
    Dataset.from_dict({"image": [1]}).to_parquet(write(tmp_path / "table", KNOWN) / "train.parquet")
    for name, why in {"named": ("no metadata file lists them", 3),
                      "table": ("tables or archives lie beside them", 4)}.items():  # fmt: skip
        with counting_left_out() as found:
            open_dataset(str(tmp_path / name))
        assert list(found.items()) == [why]


def test_links_to_a_folder_that_is_read_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, KNOWN)
    (tmp_path / "ash").symlink_to(tmp_path / "oak")
    table = open_dataset(str(tmp_path))["train"]
    assert table.features["label"].names == ["elm", "oak"]
    assert f"1 in all: {tmp_path / 'ash'} is the first" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["npy", "dcm", "mat", "nii.gz", "h5"])
def test_arrays_must_be_made_a_table(suffix: str, tmp_path: Path) -> None:
    place = write(tmp_path, [f"1.{suffix}", f"oak/2.{suffix}", "labels.csv"])
    with pytest.raises(ValueError, match=rf"made a table first, .*2 \.{suffix}: .*Array3D.* PNG"):
        open_dataset(str(place))


@pytest.mark.slow
def test_names_are_in_utf_8_in_every_locale(tmp_path: Path) -> None:
    """Python then takes names for ASCII, with each further byte by itself."""
    write(tmp_path, ["oak/é.png", "Bäume/2.png"])
    code = (
        "import sys; from vicreg_hf.data.opening.dataset import open_dataset as o; "
        "from vicreg_hf.data.splits import image_split; assert not sys.flags.utf8_mode; "
        "image_split(o(sys.argv[1]), 'train', dataset_name='x').read([0, 1])"
    )
    settings = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | settings
    )
