"""Measure speed and memory, as ratios side by side in one run."""

import sys

from vicreg_hf.runtime.sharing import share_cores

if __name__ == "__main__":  # before torch is imported
    share_cores()

import torch

from vicreg_hf.benchmarks.commands import measure
from vicreg_hf.runtime.machine import available_cores
from vicreg_hf.settings.command_line import script
from vicreg_hf.training.pretrain import ERRORS

if __name__ == "__main__":
    with script(*ERRORS):
        torch.set_num_threads(available_cores())
        print(measure(sys.argv[1:], __doc__))
