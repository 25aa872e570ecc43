"""Write a published encoder from a checkpoint of the authors, lightly or solo-learn."""

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
    parser.add_argument("checkpoint", help="A ResNet in .pth, .pt, .ckpt or .safetensors.")
    parser.add_argument("directory", help="The directory to write the encoder to.")
    parser.add_argument("--architecture", help="timm name; found by the shapes if absent.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with script(ValueError):
        check_there("checkpoint", args.checkpoint)

    from safetensors import SafetensorError

    from vicreg_hf.publishing.conversion import convert_checkpoint

    with script(ValueError, OSError, RuntimeError, SafetensorError):
        done = convert_checkpoint(args.checkpoint, args.directory, architecture=args.architecture)
        parts = "encoder and expander" if done.has_expander else "encoder"
        print(f"The {parts}, a {done.architecture}, went to {done.directory}.")
        if done.left_out:
            print(f"Left out: {', '.join(done.left_out)}.")


if __name__ == "__main__":
    main()
