"""The entry point of kdpipe. It imports everything else when that is asked for."""

from __future__ import annotations

import sys

from kdpipe.packages import ForeignPackageError, check_packages, prefer_packages

__all__ = ["ForeignPackageError", "__version__", "main"]

prefer_packages()


def main() -> None:
    """Run the command line: what the program `kdpipe` and `python -m kdpipe` do."""
    try:
        check_packages()
    except ForeignPackageError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(error.status)
    from pipeline.cli.main import main as run_command_line

    run_command_line()


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("kdpipe")
