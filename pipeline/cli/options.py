"""Options that several commands share."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.run.config import DEFAULT_CONFIG, load_config
from pipeline.run.state import RunState
from pipeline.stages import load_stages

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Any]


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

config_option = click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The kdpipe.yaml to follow.",
)

_run_option = click.option(
    "--run", "run_name", metavar="NAME", help="Another run than the config names."
)

_set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the config: distill.epochs=20.",
)


def run_options(command: Command) -> Command:
    """Options that name a run; the command gets `state`, the run as it lies on disk.

    Raises:
        ConfigError: kdpipe.yaml is missing or wrong.
        ManifestError: the run's manifest is damaged.
    """

    @config_option
    @_run_option
    @_set_option
    @wraps(command)
    def with_state(
        *, config: Path, run_name: str | None, changes: tuple[str, ...], **words: object
    ) -> object:
        stages = load_stages()
        settings = load_config(config, stages, changes=changes, run=run_name)
        return command(state=RunState(settings, stages), **words)

    return with_state
