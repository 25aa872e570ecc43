"""Measure an encoder: `accelerate launch scripts/evaluate.py --help` lists the settings."""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # a third of the time of the imports below

from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.hub.api import without_tokens
from vicreg_hf.runtime.console import begin
from vicreg_hf.settings.command_line import parse_evaluation_arguments
from vicreg_hf.training.pretrain import ERRORS


def main() -> None:
    try:
        evaluate(parse_evaluation_arguments(sys.argv[1:]))
    except ERRORS as error:
        sys.exit(f"error: {without_tokens(str(error))}")


if __name__ == "__main__":
    begin()
    main()
