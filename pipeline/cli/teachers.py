"""`kdpipe label`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from pipeline.cli.debug import debug_option
from pipeline.cli.options import run_options
from pipeline.cli.output import print_event
from pipeline.run.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipeline.run.state import RunState


def _parse_shard(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    """2/4 -> (1, 4): the zero-based place among the parts, and how many parts there are."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--shard {text!r}: write I/N with I from 1 to N, such as 2/4")
    return int(match[1]) - 1, int(match[2])


@click.command()
@run_options
@click.option(
    "--shard",
    metavar="I/N",
    default="1/1",
    callback=_parse_shard,
    help="Every N-th block, from the I-th on.",
)
@click.option("--check", is_flag=True, help="Say what is missing; ask nobody.")
@debug_option
def label(state: RunState, shard: tuple[int, int], check: bool) -> None:
    """Ask the teachers now, in parts.

    Several processes or machines can share the work. The answers lie in runs/.cache/labels, where
    `kdpipe run` finds them. Machines without a common disk copy that folder together; --check tells
    when it is complete, and `kdpipe run` asks for whatever is missing.
    """
    from pipeline.run.attempt import job_outside_a_run
    from pipeline.teachers.ingest import label_shard

    with job_outside_a_run(state, "ingest", lambda text: print_event(f"warning  {text}")) as job:
        splits = label_shard(job, state.config.params["ingest"], None if check else shard)
    missing = 0
    for name, absent, blocks in splits:
        click.echo(f"{name:<10} {blocks - absent} of {blocks} blocks are there")
        missing += absent
    if check and missing:
        raise InputError(f"{missing} blocks are missing; `kdpipe run` or another shard makes them")
