"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

import argparse
import gc
import os
import signal
import sys
from typing import Any


def _stop_before_the_run(*_: object) -> None:
    os.write(2, b"\nStopped before the run began.\n")
    os._exit(75)


def _handle_requests(handler: Any) -> None:
    for name in {"SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"} & set(dir(signal)):
        if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup does
            signal.signal(getattr(signal, name), handler)


if __name__ == "__main__":  # what is imported below takes seconds
    _handle_requests(_stop_before_the_run)
    gc.disable()  # a third of that time

from vicreg_hf.hub.api import without_tokens
from vicreg_hf.runtime.console import begin
from vicreg_hf.runtime.signals import STOPPED, Stopped
from vicreg_hf.settings.command_line import parse_arguments
from vicreg_hf.training.monitoring.preview import draw_preview
from vicreg_hf.training.pretrain import ERRORS, pretrain
from vicreg_hf.training.replay import replay


def main() -> None:
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--preview")
    flags.add_argument("--replay", type=int)
    if (instead := flags.parse_known_args()[0]) != argparse.Namespace(preview=None, replay=None):
        _handle_requests(signal.SIG_DFL)  # there is nothing to save
    try:
        args = parse_arguments(sys.argv[1:])
        if instead.preview is not None:
            print(f"Each row of {draw_preview(args, instead.preview)}: an image and its two views.")
        elif instead.replay is not None:
            print(f"The step is described in {replay(args, instead.replay)}.")
        else:
            pretrain(args)
            _handle_requests(signal.SIG_IGN)  # all is done
    except Stopped as stopped:
        _handle_requests(signal.SIG_IGN)
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except ERRORS as error:
        sys.exit(f"error: {without_tokens(str(error))}")


if __name__ == "__main__":
    begin()
    main()
