"""Find the images of a data set whose features are nearest to those of new images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vicreg_hf.runtime.sharing import share_cores


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: an error (1), or flags that do not exist (2).
    """
    share_cores()  # before torch is imported
    from vicreg_hf.settings.command_line import script
    from vicreg_hf.settings.parser import FlagsParser
    from vicreg_hf.settings.searching import check_search

    parser = FlagsParser(description=__doc__)
    parser.add_argument("--features", required=True, help="Directory that extract wrote.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--query", nargs="+", metavar="IMAGE", help="Files of the new images.")
    what.add_argument(
        "--serve", action="store_true",
        help="Show a page on this machine into which new images are dropped.",
    )  # fmt: skip
    parser.add_argument("-k", type=int, default=8, help="Images that are found for each.")
    parser.add_argument("--html", metavar="FILE", help="Write a page with the pictures, too.")
    parser.add_argument("--port", type=int, help="Port of the page; by default one that is free.")
    parser.add_argument("--split", help="Split to search; by default all.")
    parser.add_argument(
        "--model", help="The encoder, if it is no longer where the features were extracted with it."
    )
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.serve and find_spec("gradio") is None:
        sys.exit("error: serve needs the package gradio; pip install 'vicreg-hf[demo]'.")
    with script(ValueError):
        wrong, other = ("html", "query") if args.serve else ("port", "serve")
        if getattr(args, wrong) is not None:
            raise ValueError(f"{wrong} belongs to {other}; leave it out.")
        check_search(args.features, args.query or [], k=args.k, html=args.html, port=args.port)

    from vicreg_hf.features.search import open_search
    from vicreg_hf.runtime.console import warn
    from vicreg_hf.search_pages.hits import pictures_of, write_hits
    from vicreg_hf.search_pages.serve import serve

    with script(ValueError, OSError, RuntimeError):
        if args.serve:
            serve(args.features, k=args.k, split=args.split, model=args.model, port=args.port)
            return
        search = open_search(args.features, split=args.split, model=args.model)
        if args.k > search.num_rows:
            warn(f"k is {args.k}, and only {search.num_rows} images are searched; all are named.")
        found = search.find(args.query, args.k)
        print("\n\n".join(map(str, found)))
        if args.html is not None:
            write_hits(Path(args.html), search, found, pictures_of(search))
            print(f"\nWritten: {args.html}")


if __name__ == "__main__":
    main()
