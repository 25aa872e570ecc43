"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

import argparse
import sys

from safetensors import SafetensorError

from vicreg_hf.arguments import parse_arguments
from vicreg_hf.checkpointing import CheckpointError
from vicreg_hf.data import LoadingError
from vicreg_hf.hub import HubError
from vicreg_hf.pretraining import pretrain
from vicreg_hf.preview import draw_preview
from vicreg_hf.publishing import ExportError

ERRORS = (
    ValueError, OSError, SafetensorError, CheckpointError, FloatingPointError, LoadingError,
    HubError, ExportError,
)  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--preview")
    preview = flags.parse_known_args()[0].preview
    try:
        args = parse_arguments(sys.argv[1:])
        if preview is not None:
            print(f"Each row of {draw_preview(args, preview)}: an image and its two views.")
        else:
            pretrain(args)
    except ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
