"""Measure an encoder: `accelerate launch scripts/evaluate.py --help` lists the settings."""

import sys

from vicreg_hf.runtime.sharing import share_cores

if __name__ == "__main__":  # before torch is imported
    share_cores()

from vicreg_hf.evaluation.evaluate import evaluate
from vicreg_hf.settings.command_line import parse_evaluation_arguments, script
from vicreg_hf.training.pretrain import ERRORS

if __name__ == "__main__":
    with script(*ERRORS):
        evaluate(parse_evaluation_arguments(sys.argv[1:]))
