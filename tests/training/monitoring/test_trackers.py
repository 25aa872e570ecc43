"""Trackers get every number once, whatever happens to the run or to them."""

from __future__ import annotations

import getpass
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from workflow import ROOT, WHOLE, assert_same_run, interrupt, metrics, small_files, train

from vicreg_hf.hub.card import PICTURES
from vicreg_hf.training.monitoring.log import MetricsLog
from vicreg_hf.training.monitoring.trackers import Trackers, check_installed

SETTINGS = {"base_lr": 0.3, "dataset_name": "/home/ann/cells", "output_dir": "/home/ann/runs/a",
            "model_args": {"in_chans": 1}}  # fmt: skip


class Diary(GeneralTracker):
    """A user's own tracker, which writes lines to a file and can be told to fail."""

    name, requires_logging_directory = "diary", True
    fails_from = 10**9

    def __init__(self, *words: str) -> None:
        super().__init__()
        self.file = Path(words[1], "diary.txt")

    @property
    def tracker(self) -> Path:
        return self.file

    def start(self) -> None:
        self._write("start", 0 if self.fails_from < 0 else -1)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write(json.dumps(values), -1)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._write(f"{step} {values['loss']}", step or 0)

    def log_images(self, values: dict[str, Any], **_: Any) -> None:
        self._write(next(iter(values)), 0)

    def _write(self, line: str, step: int) -> None:
        if step >= self.fails_from:
            raise ConnectionError("the diary is lost")
        with self.file.open("a") as file:
            file.write(line + "\n")


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> type[Diary]:
    monkeypatch.setattr(Diary, "fails_from", 10**9)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "diary", Diary)
    return Diary


def session(directory: Path, names: list[str], steps: range) -> list[str]:
    """Report a row for each step after a checkpoint of the step before; what remains open."""
    PartialState()
    log = MetricsLog(directory / "metrics.jsonl", enabled=True)
    log.keep_until(steps.start - 1 if steps.start > 1 else -1)
    with Trackers(names, directory) as trackers:
        trackers.start(log, SETTINGS, step=steps.start - 1)
        for step in steps:
            log.add({"step": step, "loss": step / 2, "grad_norm": float("inf"), "knn_images": "a"})
        return list(trackers._open)


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in TensorBoard's files."""
    return {tag: [(e.step, e.value) for e in events(directory).Scalars(tag)]
            for tag in events(directory).Tags()["scalars"]}  # fmt: skip


def events(directory: Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(directory / "tensorboard"))
    return found.Reload()


@pytest.mark.usefixtures("one_core")
def test_tensorboard_has_every_number_of_a_run_that_was_killed_once_and_its_pictures(
    images: Path, whole_run: Path, tmp_path: Path
) -> None:
    """It begins with the whole run although only the resumed session was asked to report."""
    pytest.importorskip("tensorboard")
    first = interrupt(whole_run, tmp_path / "first")
    train(images, first, *WHOLE, "--report_to=tensorboard")
    again = interrupt(first, tmp_path / "again")
    train(images, again, *WHOLE, "--report_to=tensorboard")
    assert_same_run(again, whole_run)
    rows = metrics(again)
    curves = scalars(again)
    numbers = {key for row in rows for key in row} - {"step", "knn_images"}
    assert curves.keys() == numbers
    for key in numbers:
        expected = [(row["step"], row[key]) for row in rows if key in row]
        assert curves[key] == [(step, pytest.approx(v, rel=1e-6)) for step, v in expected]
    assert set(events(again).Tags()["images"]) == {"loss_terms", "singular_values", "retrievals"}
    (settings,) = events(again).Tensors("settings/text_summary")
    assert "base_lr: 0.3" in str(settings)
    assert str(tmp_path) not in str(settings)


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file, which is a log of LevelDB's format after 7 bytes."""
    written: Any = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield written.Record.FromString(whole)
            whole = b""


def ended(file: Path) -> bool:
    return any(record.WhichOneof("record_type") == "exit" for record in records(file))


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_goes_on_with_its_run_and_gets_no_step_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    session(tmp_path, ["wandb"], range(1, 6))
    time.sleep(1.1)  # its folders are named by the second
    session(tmp_path, ["wandb"], range(4, 8))
    wandb.teardown()  # its service may still be writing
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    until = time.monotonic() + 30  # wandb's own process may still be writing
    while time.monotonic() < until and not all(map(ended, files)):
        time.sleep(0.1)
    steps, runs = [], []
    for record in (record for file in files for record in records(file)):
        if record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
        elif record.WhichOneof("record_type") == "run":
            runs.append(record.run.run_id)
    told = b"".join(file.read_bytes() for file in files)
    for private in (str(tmp_path), str(ROOT), sys.argv[0], getpass.getuser(), "/home/ann"):
        assert private.encode() not in told
    assert not list(tmp_path.glob("wandb/offline-run-*/files/*"))  # such as what was printed
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert runs == [json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"]] * 2


@pytest.mark.usefixtures("diary")
@pytest.mark.parametrize("publish_images", [False, True])
def test_photographs_are_sent_only_where_they_may_be(publish_images: bool, tmp_path: Path) -> None:
    PartialState()
    log = MetricsLog(tmp_path / "metrics.jsonl", enabled=False)
    for name in PICTURES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    with Trackers(["diary", "tensorboard"], tmp_path) as trackers:
        trackers.start(log, SETTINGS, step=0)
        trackers.show([tmp_path / each for each in PICTURES], step=1, publish_images=publish_images)
    sent = (tmp_path / "diary.txt").read_text().splitlines()[2:]
    assert sent == [
        "loss_terms",
        "singular_values",
        *["retrievals", "feature_maps"] * publish_images,
    ]
    assert "retrievals" in events(tmp_path).Tags()["images"]  # which stays on this machine


@pytest.mark.filterwarnings("ignore")  # mlflow's own
def test_mlflow_is_told_neither_user_nor_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("LOGNAME", "MARKlogin")
    session(tmp_path, ["mlflow"], range(1, 3))
    stored = b"".join(f.read_bytes() for f in tmp_path.glob("mlruns/**/*") if f.is_file())
    assert b"vicreg-hf" in stored
    for private in ("MARKlogin", "/home/ann", sys.argv[0]):
        assert private.encode() not in stored


@pytest.mark.usefixtures("diary")
def test_others_get_settings_without_places_and_the_whole_run_in_each_session(
    tmp_path: Path,
) -> None:
    for steps in (range(1, 4), range(3, 5)):
        session(tmp_path, ["diary"], steps)
    told = '{"base_lr": 0.3, "dataset_name": "cells", "model_args": "{\\"in_chans\\": 1}"}'
    first = ["start", told, "1 0.5", "2 1.0", "3 1.5"]
    second = ["start", told, "1 0.5", "2 1.0", "3 1.5", "4 2.0"]
    assert (tmp_path / "diary.txt").read_text().splitlines() == first + second


def test_a_tracker_that_fails_is_left_with_one_warning_while_others_go_on(
    tmp_path: Path, diary: type[Diary], capsys: pytest.CaptureFixture[str]
) -> None:
    diary.fails_from = 2
    assert session(tmp_path, ["diary", "tensorboard"], range(1, 5)) == ["tensorboard"]
    said = capsys.readouterr().err
    assert said == (
        "warning: nothing more is sent to diary, and the run goes on; started again it sends what "
        "is missing: ConnectionError: the diary is lost\n"
    )
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3, 4]
    assert "grad_norm" not in scalars(tmp_path)  # which is null in metrics.jsonl


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its own
def test_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    PartialState()
    log = MetricsLog(tmp_path / "metrics.jsonl", enabled=False)
    with Trackers(["tensorboard"], tmp_path) as trackers:
        trackers.start(log, SETTINGS, step=0)
        with small_files(200):
            for step in range(20):
                trackers.add({"step": step, "loss": 0.5})
    assert capsys.readouterr().err.count("warning: nothing more is sent to tensorboard") == 1
    session(tmp_path, ["tensorboard"], range(1, 3))  # the disk has room again
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2]


def test_a_tracker_that_cannot_begin_ends_a_new_run_alone(
    tmp_path: Path, diary: type[Diary], capsys: pytest.CaptureFixture[str]
) -> None:
    session(tmp_path, ["diary"], range(1, 3))
    diary.fails_from = -1
    assert session(tmp_path, ["diary"], range(3, 5)) == []
    assert "the diary is lost" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trackers that can be used, and diary cannot: Connection"):
        session(tmp_path, ["diary"], range(1, 3))


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    missing = sorted(set(LoggerType) - {LoggerType.ALL, *get_available_trackers()}, key=str)[:2]
    packages = " ".join(map(str, missing)).replace("_", "-")
    with pytest.raises(ValueError, match=f"are not; use pip install {packages}, or --report_to"):
        check_installed([*map(str, missing), "diary"])
