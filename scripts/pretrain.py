"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

import sys

from vicreg_hf.arguments import parse_arguments
from vicreg_hf.checkpointing import CheckpointError
from vicreg_hf.images import ImageError
from vicreg_hf.pretraining import pretrain


def main() -> None:
    try:
        pretrain(parse_arguments(sys.argv[1:]))
    except (ValueError, ImageError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
