"""Errors that users can cause, and the words that messages share."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class ParityError(RuntimeError):
    """What was trained is not what is deployed."""


class RefusedError(RuntimeError):
    """The chip can't run a graph, and no exact rewrite changes that."""


class ConfigError(ValueError):
    """Words in kdpipe.yaml or on the command line that don't fit."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of known words when none is near."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(w) for w in close) + "?"
    return f"; there are {', '.join(words)}" if len(words) <= 20 else ""


class BusyError(ValueError):
    """Another process works on the run folder."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


class StageError(RuntimeError):
    """A stage could not do its work, although what it was given is sound."""


class InputError(ValueError):
    """Something a stage was given is missing, damaged, or contradicts the rest."""


class ExtraMissingError(RuntimeError):
    """A package of an optional extra is needed and not installed."""


def require_extra(extra: str, *packages: str) -> None:
    """Refuse when packages of an optional extra are not installed, without importing them.

    Raises:
        ExtraMissingError: names the packages and the extra.
    """
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        raise ExtraMissingError(
            f"{', '.join(absent)} not installed; the extra {extra!r} brings what is missing:  "
            f"pip install 'kdpipe[{extra}]'"
        )


def first_line(error: Exception) -> str:
    """The first line of a library's message, or the error's type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
