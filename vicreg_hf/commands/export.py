"""Write the encoder of a run or a checkpoint to a directory, in the format that is published."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: an error (1), or flags that do not exist (2).
    """
    from vicreg_hf.runtime.checks import check_there
    from vicreg_hf.settings.command_line import script
    from vicreg_hf.settings.parser import FlagsParser

    parser = FlagsParser(description=__doc__)
    parser.add_argument(
        "source", metavar="RUN_OR_DIR", help="output_dir of a run, an encoder, or a checkpoint."
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="Where to write; made if absent.")
    parser.add_argument("--include_expander", action="store_true", help="Write the expander too.")
    parser.add_argument("--onnx", action="store_true", help="Write onnx/model.onnx too.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with script(ValueError):
        check_there("source", args.source)

    from safetensors import SafetensorError

    from vicreg_hf.publishing.publish import export_source

    with script(ValueError, OSError, RuntimeError, SafetensorError):
        for path in export_source(
            args.source, args.directory, include_expander=args.include_expander, onnx=args.onnx
        ):
            print(f"Written: {path}")


if __name__ == "__main__":
    main()
