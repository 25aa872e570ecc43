"""Features of a whole data set: `accelerate launch scripts/extract_features.py --help`."""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # a third of the time of the imports below

from vicreg_hf.console import begin
from vicreg_hf.extraction import ExtractionArguments, extract_dataset
from vicreg_hf.flags import SettingsParser
from vicreg_hf.hub import without_tokens
from vicreg_hf.loading import LoadingError


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
