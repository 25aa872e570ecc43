"""Measure an encoder: `accelerate launch scripts/evaluate.py --help` lists the settings."""

import sys

from vicreg_hf.data import LoadingError
from vicreg_hf.evaluating import REPORT, RESULTS, evaluate
from vicreg_hf.evaluation.arguments import parse_evaluation_arguments
from vicreg_hf.hub import without_tokens


def main() -> None:
    try:
        args = parse_evaluation_arguments(sys.argv[1:])
        evaluate(args)
    except (ValueError, OSError, RuntimeError, FloatingPointError, LoadingError) as error:
        sys.exit(f"error: {without_tokens(str(error))}")
    print(f"In {args.output_dir}: {RESULTS}, and {REPORT} to open in a browser.")


if __name__ == "__main__":
    main()
