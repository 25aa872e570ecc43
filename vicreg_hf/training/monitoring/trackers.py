"""Trackers such as TensorBoard, driven by accelerate, that show a run's numbers while it trains.

`trackers.json` in output_dir remembers under which id a tracker knows the run, and the last step
that was sent to it, so that a run that goes on continues its curves and sends no step twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from tqdm import tqdm

from vicreg_hf.hub.card import PHOTOGRAPHS
from vicreg_hf.hub.record import LOCAL_SETTINGS, impersonal
from vicreg_hf.runtime.checks import one_line
from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.signals import Stopped
from vicreg_hf.training.monitoring.log import MetricsLog

PROJECT = "vicreg-hf"
"""The project or experiment in which trackers put a run, unless their own variables name one."""
STATE = "trackers.json"
RECORDS = (STATE, "tensorboard", "wandb")
"""What trackers leave in output_dir."""
LOCAL = ("tensorboard",)
"""Trackers that write to output_dir, and send nothing from this machine."""
CONTINUED = ("tensorboard", "wandb", "mlflow")
"""Trackers that go on with the curves of an earlier session; others get the whole run again."""


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        ValueError: it names them, and the command that installs them.
    """
    installed = {str(kind) for kind in get_available_trackers()}
    missing = [n for n in names if n in LoggerType.list() and n not in installed]
    if missing:
        raise ValueError(
            f"report_to must name trackers that are installed, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; use pip install "
            f"{' '.join(missing).replace('_', '-')}, or --report_to none."
        )


class Trackers:
    """The trackers of a run, for its main process; as a context, it ends with them.

    One that fails is left alone until the run is started again, and then gets what is missing.

    Args:
        names: as accelerate calls them.
        directory: output_dir.
    """

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        self.names, self.directory = names, directory
        self._known: dict[str, dict[str, Any]] = {}
        self._open: dict[str, Any] = {}
        self._now: dict[str, int] = {}
        """The step that this session has sent last, of which more may follow."""

    def start(self, log: MetricsLog, settings: Mapping[str, Any], *, step: int) -> None:
        """Begin or go on, send the rows that a tracker has not had, and from now on every row.

        Args:
            log: without the rows of later steps than step.
            settings: of the run; trackers get those that influence the model, without paths.
            step: from which the run goes on.

        Raises:
            ValueError: a tracker cannot be used, and no step would be lost by saying so.
        """
        if step:
            with suppress(OSError, ValueError):
                self._known = json.loads((self.directory / STATE).read_text())
        try:
            self._start(log, settings, step)
        except ValueError as error:
            self.__exit__(type(error))
            raise
        log.listeners.append(self.add)

    def _start(self, log: MetricsLog, settings: Mapping[str, Any], step: int) -> None:
        told = impersonal({k: v for k, v in settings.items() if k not in LOCAL_SETTINGS})
        for name in self.names:
            with self._going_on_without(name, raising=step == 0):
                self._open[name] = self._begin(name, told, step)
                for row in log.rows():
                    self._send(name, row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row of the metrics log."""
        for name in list(self._open):
            with self._going_on_without(name):
                self._send(name, row)

    def show(self, files: Sequence[Path], *, step: int, publish_images: bool = False) -> None:
        """Send pictures, under their names without extension, to trackers that take pictures.

        Args:
            publish_images: also those that show images of the data, which otherwise only trackers
                that stay on this machine get.
        """
        for name, tracker in list(self._open.items()):
            with self._going_on_without(name):
                for file in files:
                    photographs = any(file.as_posix().endswith(each) for each in PHOTOGRAPHS)
                    if name in LOCAL or publish_images or not photographs:
                        _show(name, tracker, file, step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until everything has been sent, and say whether the run has failed."""
        failed = kind is not None and not issubclass(kind, Stopped)
        for name, tracker in list(self._open.items()):
            with self._going_on_without(name):
                if failed and name == "wandb":
                    tracker.tracker.finish(exit_code=1)
                else:
                    tracker.finish()
        self._open.clear()

    def _begin(self, name: str, settings: Mapping[str, Any], step: int) -> Any:
        known = self._known.get(name, {}) if name in CONTINUED else {}
        last = known.get("sent", -1)
        tracker = _create(name, self.directory, known.get("id"), step)
        tracker.start()
        if name == "tensorboard":
            last = min(last, step if step else -1)  # later steps were purged
        if name == "mlflow":
            known = {"id": tracker.tracker.info.run_id}
        elif name == "wandb":
            known = {"id": tracker.tracker.id}
            if tracker.tracker.resumed:  # a run that was killed may have left some unsent
                last = tracker.tracker.starting_step - 1
        if name == "tensorboard":  # its table of settings would be a run of its own
            if last < 0:
                lines = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).splitlines()
                tracker.log({"settings": "\n".join(f"    {line}" for line in lines)}, step=step)
        elif last < 0 or name == "wandb":  # mlflow takes none a second time
            plain = {k: json.dumps(v) if isinstance(v, (dict, list)) else v
                     for k, v in settings.items()}  # fmt: skip
            tracker.store_init_configuration(plain)
        self._known[name] = known | {"sent": last}
        self._remember()
        return tracker

    def _send(self, name: str, row: Mapping[str, Any]) -> None:
        known, step = self._known[name], row["step"]
        before = known["sent"]
        if step <= before and self._now.get(name) != step:
            return
        known["sent"] = self._now[name] = step
        self._remember()  # first: a point is rather missing than there twice
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        try:
            finite = {k: v for k, v in numbers.items() if math.isfinite(v)}
            self._open[name].log(finite, step=step)
        except Exception:
            known["sent"] = before
            with suppress(OSError):
                self._remember()
            raise

    def _remember(self) -> None:
        aside = self.directory / f".{STATE}.partial"
        aside.write_text(json.dumps(self._known))
        aside.replace(self.directory / STATE)

    @contextmanager
    def _going_on_without(self, name: str, *, raising: bool = False) -> Iterator[None]:
        """Leave a tracker that fails, with a warning.

        Args:
            raising: fail instead.
        """
        with (
            tqdm.external_write_mode(sys.stderr),
            optional(
                f"nothing more is sent to {name}, and the run goes on; started again it sends "
                "what is missing"
            ),
        ):
            try:
                yield
            except Exception as error:
                self._open.pop(name, None)
                if not raising:
                    raise
                fault = f"{type(error).__name__}: {one_line(error)[:300]}".removesuffix(": ")
        if raising and name not in self._open:
            raise ValueError(
                f"report_to must name trackers that can be used, and {name} cannot: {fault}. "
                "Mend that, or leave it out."
            )


def _create(name: str, directory: Path, run_id: str | None, step: int) -> Any:
    """A tracker that begins a run or, where there is an id, goes on with it."""
    title = directory.resolve().name
    settings: dict[str, Any] = {}
    project = PROJECT
    if name == "tensorboard":
        project, settings["purge_step"] = name, step + 1 if step else 0
    elif name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        own = {"id": run_id or uuid.uuid4().hex, "name": title, "dir": str(directory)}
        variables = {"id": "WANDB_RUN_ID", "name": "WANDB_NAME", "dir": "WANDB_DIR"}
        settings = {k: v for k, v in own.items() if variables[k] not in os.environ}
        settings["resume"] = "allow"
        settings["settings"] = _reticent()
    elif name == "mlflow":
        who = dict.fromkeys(("mlflow.user", "mlflow.source.name"), PROJECT)  # else user and path
        settings = {"run_id": run_id, "run_name": title, "tags": who}
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    place = [str(directory)] if kind.requires_logging_directory else []
    return kind(project, *place, **settings)


def _reticent() -> Any:
    """Settings of wandb that keep command line, host, user, packages and what is printed here."""
    from wandb import Settings

    wanted = {
        "console": "off", "disable_git": True, "disable_code": True, "save_code": False,
        "host": "machine", "x_disable_meta": True, "x_disable_machine_info": True,
        "x_save_requirements": False,
    }  # fmt: skip
    known = getattr(Settings, "model_fields", {})  # which older releases have not all
    return Settings(**{key: value for key, value in wanted.items() if key in known})


def _show(name: str, tracker: Any, file: Path, step: int) -> None:
    if not hasattr(tracker, "log_images"):
        if hasattr(tracker, "log_artifact"):
            tracker.log_artifact(str(file))
        return
    pixels = np.asarray(Image.open(file).convert("RGB"))
    more = {"dataformats": "NHWC"} if name == "tensorboard" else {}
    one = name in ("aim", "clearml")  # the others take a batch
    tracker.log_images({file.stem: pixels if one else pixels[None]}, step=step, **more)
