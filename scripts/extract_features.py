"""Features of a whole data set: `accelerate launch scripts/extract_features.py --help`."""

from vicreg_hf.commands.extract import main

if __name__ == "__main__":
    main()
