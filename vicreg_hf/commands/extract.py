"""Write the features of every image of a data set, as a data set of parquet."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vicreg_hf.runtime.sharing import share_cores


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: an error (1), or flags that do not exist (2).
    """
    share_cores()  # before torch is imported
    from vicreg_hf.settings.command_line import script
    from vicreg_hf.settings.extraction import ExtractionArguments
    from vicreg_hf.settings.parser import SettingsParser

    parser = SettingsParser(ExtractionArguments, description=__doc__ or "")
    with script(ValueError, OSError):
        args = parser.read(sys.argv[1:] if argv is None else argv)

    from vicreg_hf.data.workers import LoadingError
    from vicreg_hf.features.extract import extract_dataset

    with script(ValueError, OSError, RuntimeError, LoadingError):
        directory = extract_dataset(args)
        print(f'The features are in {directory}: datasets.load_dataset("{directory}")')


if __name__ == "__main__":
    main()
