"""What commands print: lines for people, JSON for programs, events on stderr."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping


def print_json(document: Mapping[str, Any]) -> None:
    """A document on stdout."""
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))


def print_event(line: str) -> None:
    """A line on stderr, its digests shortened."""
    click.echo(shorten(line), err=True)


def shorten(text: str) -> str:
    """Digests cut to twelve digits, for people."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text)


def relative(path: Path) -> str:
    """The path as seen from the working directory, where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
