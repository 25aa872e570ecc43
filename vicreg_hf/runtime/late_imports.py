"""Importing one module as soon as another one has been imported."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_after(module: str, then: str) -> None:
    """Import `then` as soon as `module` is imported: now, later or never.

    So a package registers itself with a library without importing it, which would take seconds.
    """
    if module in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Follower(module, then))


class _Follower(MetaPathFinder):
    """Finds one module as the other finders do, and has another one imported after it."""

    def __init__(self, module: str, then: str) -> None:
        self.module, self.then = module, then

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(loaded: ModuleType) -> None:
                execute(loaded)
                importlib.import_module(self.then)

            loader.exec_module = exec_module
        return spec
