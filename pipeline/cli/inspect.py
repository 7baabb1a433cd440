"""`kdpipe verify` and `kdpipe doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.cli.debug import debug_option
from pipeline.cli.options import json_option, run_options
from pipeline.cli.output import print_json
from pipeline.run.errors import ParityError
from pipeline.run.manifest import ManifestError

if TYPE_CHECKING:
    from pipeline.run.state import RunState


@click.command()
@run_options
@click.option(
    "--parity",
    is_flag=True,
    help="Also prove that training tensor, PNG, YAML, ONNX and int8 agree, computed anew.",
)
@json_option
@debug_option
def verify(state: RunState, parity: bool, as_json: bool) -> None:
    """Hash every artifact again, and name what differs.

    Also checks that every artifact that repeats the contract's digest repeats the right one.
    """
    from pipeline.parity.verify import verify_parity
    from pipeline.run.verification import verify_run

    verification = verify_run(state)
    legs = verify_parity(state) if parity and not verification.problems else []
    if as_json:
        document = {
            "run": state.config.run,
            "checked": verification.checked,
            "problems": verification.problems,
        }
        rows = [row.document() for row in legs]
        print_json({**document, "parity": rows} if parity else document)
    else:
        click.echo(f"{verification.checked} files of run {state.config.run} checked")
        for problem in verification.problems:
            click.echo(f"  {problem}")
        for row in legs:
            word = {True: "passed", False: "FAILED", None: "-"}[row.passed]
            leg = row.leg
            click.echo(f"{leg.name:<7} {word:<7} {leg.source} / {leg.target} (n {leg.n})")
            click.echo(f"        {row.message}" + (f"; limit {row.limit}" if row.limit else ""))
    if verification.problems:
        raise ManifestError(
            f"{len(verification.problems)} of the run's files are not what its manifest says: "
            f"{verification.problems[0]}"
        )
    failures = [row for row in legs if row.passed is False]
    if failures:
        raise ParityError("; ".join(f"parity, {row.leg.name}: {row.message}" for row in failures))


@click.command()
@json_option
@debug_option
def doctor(as_json: bool) -> None:
    """Show versions, SDK and device of this machine."""
    from pipeline.delivery.doctor import examine_machine

    sections = examine_machine()
    if as_json:
        print_json(sections)
        return
    for section, entries in sections.items():
        click.echo(section)
        for name, value in entries.items():
            click.echo(f"  {name:<16} {value}")
