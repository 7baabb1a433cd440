"""One file per stage: parameters in, facts out; found by their file names."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from pipeline.run.stage import Stage, order_stages


def stage_names() -> tuple[str, ...]:
    """The files in this folder, alphabetically; imports none of them."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def load_stages() -> dict[str, Stage[Any, Any]]:
    """Every stage by name, each after the stages that make its inputs.

    Raises:
        StageError: two stages make one artifact, nobody makes an input, or there is a cycle.
    """
    found = {name: import_module(f"{__name__}.{name}").STAGE for name in stage_names()}
    return order_stages(found)
