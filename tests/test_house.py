"""Which room of the package may import which, and how many rooms a floor has."""

from __future__ import annotations

import ast

from workflow import ROOT

PACKAGE = ROOT / "vicreg_hf"
FLOORS = (
    {"runtime"},
    {"loss", "models", "metrics", "checkpoints"},
    {"configuration_vicreg", "views"},
    {"data", "hub"},
    {"modeling_vicreg", "settings"},
    {"publishing"},
    {"features"},
    {"evaluation", "training"},
    {"benchmarks", "search_pages"},
    {"commands"},
)
"""Folders and modules at the root of the package, from the ground up. Those on one floor do not
import each other."""
PUBLISHED = {"modalities"}
"""Names that published cards cite, and that are kept where they were."""
MOST_MODULES = 12


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
"""Every module of the package by its dotted name."""
ROOMS = [name for name in MODULES if name != PACKAGE.name and name.split(".")[1] not in PUBLISHED]


def imports(name: str) -> set[str]:
    """The package's own modules that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative path"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {module for module in found if module.split(".")[0] == PACKAGE.name}


def floor(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_a_room_imports_only_what_stands_below_it() -> None:
    for module in ROOMS:
        for other in imports(module):
            assert other != PACKAGE.name, f"{module} imports the package's face"
            if other.split(".")[1] != module.split(".")[1]:
                assert floor(other) < floor(module), f"{module} imports {other}"


def test_no_circle_of_imports() -> None:
    left = {name: imports(name) - {"vicreg_hf"} for name in ROOMS}
    while left:
        ground = {name for name, below in left.items() if not below & left.keys()}
        assert ground, f"these import each other in a circle: {', '.join(sorted(left))}"
        left = {name: below for name, below in left.items() if name not in ground}


def test_no_import_is_hidden_from_those_who_run_the_code() -> None:
    for module, file in MODULES.items():
        assert "TYPE_CHECKING" not in file.read_text(encoding="utf-8"), module


def test_folders_hold_few_modules_and_say_what_belongs_there() -> None:
    for folder in {file.parent for file in MODULES.values()}:
        names = {file.name for file in folder.glob("*.py")} - {"__init__.py"}
        assert len(names) <= MOST_MODULES, f"{folder} holds {names}"
        sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert sentence, f"{folder} does not say what belongs there"
    root = {file.name for file in PACKAGE.glob("*.py")}
    assert root == {"__init__.py", "configuration_vicreg.py", "modeling_vicreg.py"}
