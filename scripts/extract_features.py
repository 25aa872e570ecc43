"""Features of a whole data set: `accelerate launch scripts/extract_features.py --help`."""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # a third of the time of the imports below

from vicreg_hf.data.workers import LoadingError
from vicreg_hf.features.extract import extract_dataset
from vicreg_hf.hub.api import without_tokens
from vicreg_hf.runtime.console import begin
from vicreg_hf.settings.extraction import ExtractionArguments
from vicreg_hf.settings.parser import SettingsParser


def main() -> None:
    parser = SettingsParser(
        ExtractionArguments,
        description="Write the features of every image of a data set, as a data set of parquet.",
    )
    try:
        directory = extract_dataset(ExtractionArguments(**vars(parser.parse_args())))
    except (ValueError, OSError, RuntimeError, LoadingError) as error:
        sys.exit(f"error: {without_tokens(str(error))}")
    print(f'The features are in {directory}: datasets.load_dataset("{directory}")')


if __name__ == "__main__":
    begin()
    main()
