"""Publish the encoder of a run on the Hub, or a page that searches extracted features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: an error (1), or flags that do not exist (2).
    """
    from transformers.hf_argparser import string_to_bool

    from vicreg_hf.settings.command_line import script
    from vicreg_hf.settings.parser import FlagsParser

    parser = FlagsParser(description=__doc__)
    parser.add_argument(
        "source", metavar="RUN_OR_DIR",
        help="output_dir of a run, or an encoder; with --space, features that extract wrote.",
    )  # fmt: skip
    parser.add_argument("--repo_id", help="Repository of the encoder, org/name; made if absent.")
    parser.add_argument("--space", help="Space of the page, org/name; made if absent.")
    parser.add_argument(
        "--private", type=string_to_bool, nargs="?", const=True,
        help="Push to a private repository alone; a new Space is private unless false is given.",
    )  # fmt: skip
    parser.add_argument(
        "--model", help="The encoder of a Space, if not where the features were extracted with it."
    )
    parser.add_argument("--include_expander", action="store_true", help="Publish the expander too.")
    parser.add_argument("--revision", help="A branch; made if absent.")
    parser.add_argument("--onnx", action="store_true", help="Publish onnx/model.onnx too.")
    parser.add_argument("--license", help="The licence of the weights, such as cc-by-4.0.")
    parser.add_argument(
        "--publish_images", type=string_to_bool, nargs="?", const=True, default=False,
        help="Publish pictures that show images of the data too (false unless true is given).",
    )  # fmt: skip
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with script(ValueError):
        _check(args)

    from safetensors import SafetensorError
    from yaml import YAMLError

    from vicreg_hf.publishing.publish import publish
    from vicreg_hf.search_pages.space import publish_space

    with script(ValueError, OSError, RuntimeError, SafetensorError, YAMLError):
        common = {"license": args.license, "publish_images": args.publish_images}
        if args.space:
            address = publish_space(
                args.source, args.space, model=args.model, private=args.private, **common
            )
        else:
            address = publish(
                args.source, args.repo_id, private=args.private or None, revision=args.revision,
                include_expander=args.include_expander, onnx=args.onnx, **common,
            )  # fmt: skip
        print(f"Published: {address}")


def _check(args: Any) -> None:
    """Refuse what cannot be published, before anything is imported that takes seconds.

    Raises:
        ValueError: a flag contradicts another, has another form, or names nothing that is there.
    """
    from vicreg_hf.hub.api import check_licence, check_repo_id, check_revision
    from vicreg_hf.runtime.checks import check_there
    from vicreg_hf.settings.searching import check_features

    if (args.repo_id is None) == (args.space is None):
        given = f"both {args.repo_id} and {args.space}" if args.space else "none"
        raise ValueError(
            f"one of repo_id, for an encoder, and space, for a page, must be given, got {given}."
        )
    not_its_own = ("include_expander", "onnx", "revision") if args.space else ("model",)
    if wrong := [name for name in not_its_own if getattr(args, name)]:
        other = "repo_id" if args.space else "space"
        raise ValueError(f"{wrong[0]} belongs to {other}; leave it out.")
    check_repo_id(args.space or args.repo_id, "space" if args.space else "repo_id")
    if args.revision is not None:
        check_revision(args.revision)
    if args.license is not None:
        check_licence(args.license)
    check_there("source", args.source)
    if args.space:
        check_features(args.source)


if __name__ == "__main__":
    main()
