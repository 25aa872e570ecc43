"""Measure an encoder: `accelerate launch scripts/evaluate.py --help` lists the settings."""

from vicreg_hf.commands.evaluate import main

if __name__ == "__main__":
    main()
