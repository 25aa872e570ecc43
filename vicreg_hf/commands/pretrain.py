"""Pretrain an encoder; with --preview or --replay, draw views or repeat a step instead."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from vicreg_hf.runtime.sharing import share_cores
from vicreg_hf.runtime.signals import STOPPED, Stopped, handle_requests, stop_before_the_run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: with the status that scripts/README.md lists; 0 is none.
    """
    words = sys.argv[1:] if argv is None else argv
    handle_requests(stop_before_the_run)  # what is imported below takes seconds
    share_cores()  # before torch is imported
    from vicreg_hf.settings.command_line import early, parse_arguments, script

    with script(ValueError, OSError):
        instead = early(words, "preview", "replay")
        if instead.preview is not None or instead.replay is not None:
            handle_requests(signal.SIG_DFL)  # there is nothing to save
        args = parse_arguments(words)

    from vicreg_hf.training.monitoring.preview import draw_preview
    from vicreg_hf.training.pretrain import ERRORS, pretrain
    from vicreg_hf.training.replay import replay

    with script(*ERRORS):
        if instead.preview is not None:
            print(f"Each row of {draw_preview(args, instead.preview)}: an image and its views.")
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
    main()
