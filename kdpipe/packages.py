"""The packages that came with kdpipe, told from others of the same names.

`pipeline`, `metis` and `preprocessing` are common words: a user's own folder may have such a name,
and so do distributions on the public index. Whatever stands first on sys.path, kdpipe takes those
that lie beside it.
"""

from __future__ import annotations

import os.path
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


PACKAGES = ("pipeline", "metis", "preprocessing")

#: Where they lie: a checkout, or the folder that a wheel was installed into.
FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120 - light


class ForeignPackageError(ImportError):
    """A package that has one of our names was imported before ours."""

    status = 5


class PackageFinder:
    """Finds our packages beside this one, and nothing else."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What Python's import asks of every finder."""
        return PathFinder.find_spec(name, [FOLDER]) if name in PACKAGES else None


def prefer_packages() -> None:
    """Have this process, and those that it forks or spawns, import our packages by our names."""
    if PackageFinder not in sys.meta_path:
        sys.meta_path.insert(0, PackageFinder)


def check_packages() -> None:
    """Refuse to work with another package of one of our names.

    Raises:
        ForeignPackageError: one is imported already; says where it lies.
    """
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is None:
            continue
        places = list(getattr(module, "__path__", [])) or [str(getattr(module, "__file__", ""))]
        if os.path.dirname(os.path.realpath(places[0])) != FOLDER:  # noqa: PTH120 - as above
            raise ForeignPackageError(
                f"another package called {name!r} is imported already, from {places[0]}; "
                "import kdpipe before it, or in a process of its own"
            )
