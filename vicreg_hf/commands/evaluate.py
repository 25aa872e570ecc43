"""Measure an encoder on a labelled data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vicreg_hf.runtime.sharing import share_cores


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: an error (1), or flags that do not exist (2).
    """
    share_cores()  # before torch is imported
    from vicreg_hf.settings.command_line import parse_evaluation_arguments, script

    with script(ValueError, OSError):
        args = parse_evaluation_arguments(sys.argv[1:] if argv is None else argv)

    from vicreg_hf.evaluation.evaluate import evaluate
    from vicreg_hf.training.pretrain import ERRORS

    with script(*ERRORS):
        evaluate(args)


if __name__ == "__main__":
    main()
