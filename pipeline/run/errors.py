"""Errors that users can cause, each with the exit status it ends with, and shared wording.

Every error that a user can cause carries `status` as a class attribute, wherever it is defined; the
command line prints its message as one line and ends with it (docs/commands.md lists them):

    ValueError
      ContractError       preprocessing/contract.py      3
      ConfigError         here                           2
      InputError          here                           3
      BusyError           here                           3
      ManifestError       pipeline/run/manifest.py       3
    RuntimeError
      StageError          here                           1
        KdbenchError      pipeline/delivery/device_run.py  that of kdbench.py
      ExtraMissingError   here                           5
      ParityError         here                           4
      RefusedError        here                           4
      GateError           here                           4, or 7 for the benchmark's verdict
      IncomparableError   pipeline/reports/compare_benchmarks.py  4
      BackendError        metis/backend.py               1
        BackendMissingError                              5
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class ParityError(RuntimeError):
    """What was trained is not what is deployed."""

    status = 4


class RefusedError(RuntimeError):
    """The chip can't run a graph, and no exact rewrite changes that."""

    status = 4


class GateError(RuntimeError):
    """A gate said no; `status` is the exit status for it."""

    status = 4

    def __init__(self, stage: str, gate: str, message: str, status: int) -> None:
        """Say which gate of which stage."""
        super().__init__(
            f"{stage}: gate {gate} did not pass: {message}\n"
            f"  what was made stays; to go on all the same: --allow gate={gate}"
        )
        self.status = status


class ConfigError(ValueError):
    """Words in kdpipe.yaml or on the command line that don't fit."""

    status = 2


def nearest(word: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of known words when none is near."""
    choices = sorted(names)
    close = _matches(word, choices, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(w) for w in close) + "?"
    return f"; there are {', '.join(choices)}" if len(choices) <= 20 else ""


class BusyError(ValueError):
    """Another process works on the run folder."""

    status = 3


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


class StageError(RuntimeError):
    """A stage could not do its work, although what it was given is sound."""

    status = 1


class InputError(ValueError):
    """Something a stage was given is missing, damaged, or contradicts the rest."""

    status = 3


class ExtraMissingError(RuntimeError):
    """A package of an optional extra is needed and not installed."""

    status = 5


def near_names(name: str, names: Iterable[str]) -> str:
    """Up to four names that are like this one, or the first four: for the parts of a network."""
    names = [n for n in names if n]  # torch calls the whole network ""
    return ", ".join(_matches(name, names, n=4, cutoff=0.3) or names[:4]) or "none"


def _matches(word: str, names: list[str], n: int, cutoff: float) -> list[str]:
    from difflib import get_close_matches  # only here: most commands end without a typing error

    return get_close_matches(word, names, n, cutoff)


def require_extra(extra: str, *packages: str) -> None:
    """Refuse when packages of an optional extra are not installed, without importing them.

    Raises:
        ExtraMissingError: names the packages and the extra.
    """
    from importlib.util import find_spec

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
