"""Features of a whole data set: `accelerate launch scripts/extract_features.py --help`."""

import sys

from transformers import HfArgumentParser

from vicreg_hf.data import LoadingError
from vicreg_hf.extraction import ExtractionArguments, extract_dataset
from vicreg_hf.hub import without_tokens


def main() -> None:
    parser = HfArgumentParser(
        ExtractionArguments,  # pyright: ignore[reportArgumentType]
        allow_abbrev=False,
        description="Write the features of every image of a data set, as a data set of parquet.",
    )
    try:
        directory = extract_dataset(ExtractionArguments(**vars(parser.parse_args())))
    except (ValueError, OSError, RuntimeError, LoadingError) as error:
        sys.exit(f"error: {without_tokens(str(error))}")
    print(f'The features are in {directory}: datasets.load_dataset("{directory}")')


if __name__ == "__main__":
    main()
