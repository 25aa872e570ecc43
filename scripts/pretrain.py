"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

import argparse
import signal
import sys

from vicreg_hf.runtime.signals import STOPPED, Stopped, handle_requests, stop_before_the_run

if __name__ == "__main__":  # what is imported below takes seconds
    handle_requests(stop_before_the_run)

from vicreg_hf.settings.command_line import parse_arguments, script
from vicreg_hf.training.monitoring.preview import draw_preview
from vicreg_hf.training.pretrain import ERRORS, pretrain
from vicreg_hf.training.replay import replay


def main() -> None:
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--preview")
    flags.add_argument("--replay", type=int)
    if (instead := flags.parse_known_args()[0]) != argparse.Namespace(preview=None, replay=None):
        handle_requests(signal.SIG_DFL)  # there is nothing to save
    args = parse_arguments(sys.argv[1:])
    if instead.preview is not None:
        print(f"Each row of {draw_preview(args, instead.preview)}: an image and its two views.")
    elif instead.replay is not None:
        print(f"The step is described in {replay(args, instead.replay)}.")
    else:
        try:
            pretrain(args)
        except Stopped as stopped:
            handle_requests(signal.SIG_IGN)
            print(stopped, file=sys.stderr)
            sys.exit(STOPPED)
        handle_requests(signal.SIG_IGN)  # all is done


if __name__ == "__main__":
    with script(*ERRORS):
        main()
