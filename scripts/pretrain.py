"""Pretrain an encoder: `accelerate launch scripts/pretrain.py --help` lists the settings."""

from vicreg_hf.commands.pretrain import main

if __name__ == "__main__":
    main()
