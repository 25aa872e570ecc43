"""List the recipes that are shipped, or print one as YAML, to be kept and changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on its flags, by default those of this process.

    Raises:
        SystemExit: no such recipe (1), or flags that do not exist (2).
    """
    from vicreg_hf.settings.command_line import script
    from vicreg_hf.settings.evaluation import EvaluationArguments
    from vicreg_hf.settings.parser import FlagsParser
    from vicreg_hf.settings.recipes import describe_recipes, recipe_names, recipe_text

    parser = FlagsParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="The recipe to print.")
    name = parser.parse_args(sys.argv[1:] if argv is None else argv).name
    with script(ValueError):
        if name is not None:
            print(recipe_text(name, "", EvaluationArguments.recipe_folder), end="")
        else:
            evaluation = ", ".join(recipe_names(EvaluationArguments.recipe_folder))
            print(
                f"{describe_recipes()}\n\nRecipes of evaluate: {evaluation}.\n"
                "--config NAME takes a recipe; the name after this command prints its settings."
            )


if __name__ == "__main__":
    main()
