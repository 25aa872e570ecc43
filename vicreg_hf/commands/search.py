"""Find the images of a data set whose features are nearest to those of new images."""

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
    from vicreg_hf.settings.parser import FlagsParser

    parser = FlagsParser(description=__doc__)
    parser.add_argument("--features", required=True, help="Directory that extract wrote.")
    parser.add_argument(
        "--query", required=True, nargs="+", metavar="IMAGE", help="Files of the new images."
    )
    parser.add_argument("-k", type=int, default=8, help="Images that are found for each.")
    parser.add_argument("--split", help="Split to search; by default all.")
    parser.add_argument(
        "--model", help="The encoder, if it is no longer where the features were extracted with it."
    )
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from vicreg_hf.features.search import nearest_images

    with script(ValueError, OSError, RuntimeError):
        found = nearest_images(
            args.features, args.query, k=args.k, split=args.split, model=args.model
        )
        print("\n\n".join(map(str, found)))


if __name__ == "__main__":
    main()
