"""Publish the encoder of a run on the Hub: `python scripts/publish.py --help`."""

from vicreg_hf.commands.publish import main

if __name__ == "__main__":
    main()
