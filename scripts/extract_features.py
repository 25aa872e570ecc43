"""Features of a whole data set: `accelerate launch scripts/extract_features.py --help`."""

import sys

from vicreg_hf.runtime.sharing import share_cores

if __name__ == "__main__":  # before torch is imported
    share_cores()

from vicreg_hf.data.workers import LoadingError
from vicreg_hf.features.extract import extract_dataset
from vicreg_hf.settings.command_line import script
from vicreg_hf.settings.extraction import ExtractionArguments
from vicreg_hf.settings.parser import SettingsParser


def main() -> None:
    parser = SettingsParser(
        ExtractionArguments,
        description="Write the features of every image of a data set, as a data set of parquet.",
    )
    directory = extract_dataset(parser.read(sys.argv[1:]))
    print(f'The features are in {directory}: datasets.load_dataset("{directory}")')


if __name__ == "__main__":
    with script(ValueError, OSError, RuntimeError, LoadingError):
        main()
