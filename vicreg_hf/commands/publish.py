"""Publish the encoder of a run on the Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: an error (1), or flags that do not exist (2).
    """
    from transformers.hf_argparser import string_to_bool

    from vicreg_hf.settings.command_line import script
    from vicreg_hf.settings.parser import FlagsParser

    parser = FlagsParser(description=__doc__)
    parser.add_argument("source", metavar="RUN_OR_DIR", help="output_dir of a run, or an encoder.")
    parser.add_argument("--repo_id", required=True, help="org/name; made if absent.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--include_expander", action="store_true", help="Publish the expander too.")
    parser.add_argument("--revision", help="A branch; made if absent.")
    parser.add_argument("--onnx", action="store_true", help="Publish onnx/model.onnx too.")
    parser.add_argument("--license", help="The licence of the weights, such as cc-by-4.0.")
    parser.add_argument(
        "--publish_images", type=string_to_bool, nargs="?", const=True, default=False,
        help="Publish the picture that shows images of the data too (false unless true is given).",
    )  # fmt: skip
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from safetensors import SafetensorError
    from yaml import YAMLError

    from vicreg_hf.publishing.publish import publish

    with script(ValueError, OSError, RuntimeError, SafetensorError, YAMLError):
        address = publish(
            args.source, args.repo_id, private=args.private or None, revision=args.revision,
            include_expander=args.include_expander, onnx=args.onnx, license=args.license,
            publish_images=args.publish_images,
        )  # fmt: skip
        print(f"Published: {address}")


if __name__ == "__main__":
    main()
