"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

import signal
import sys

from vicreg_hf.runtime.sharing import share_cores
from vicreg_hf.runtime.signals import STOPPED, Stopped, handle_requests, stop_before_the_run

if __name__ == "__main__":  # what is imported below takes seconds
    handle_requests(stop_before_the_run)
    share_cores()

from vicreg_hf.settings.command_line import early, parse_arguments, script
from vicreg_hf.training.monitoring.preview import draw_preview
from vicreg_hf.training.pretrain import ERRORS, pretrain
from vicreg_hf.training.replay import replay


def main() -> None:
    instead = early(sys.argv[1:], "preview", "replay")
    if instead.preview is not None or instead.replay is not None:
        handle_requests(signal.SIG_DFL)  # there is nothing to save
    args = parse_arguments(sys.argv[1:])
    if instead.preview is not None:
        print(f"Each row of {draw_preview(args, instead.preview)}: an image and its two views.")
    elif instead.replay is not None:
        print(f"The step is described in {replay(args, int(instead.replay))}.")
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
