"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

import sys

from safetensors import SafetensorError

from vicreg_hf.arguments import parse_arguments
from vicreg_hf.checkpointing import CheckpointError
from vicreg_hf.pretraining import pretrain


def main() -> None:
    try:
        pretrain(parse_arguments(sys.argv[1:]))
    except (ValueError, OSError, SafetensorError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
