"""`kdpipe run` and `kdpipe status`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.debug import Switches, debug_option
from pipeline.cli.options import json_option, run_options
from pipeline.cli.output import print_event, print_json, relative, shorten
from pipeline.reports.report import parse_report, summary_lines
from pipeline.run.errors import ConfigError, nearest
from pipeline.run.processes import follow, is_follower, leading
from pipeline.run.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.run.state import Examination, RunState


@click.command()
@run_options
@click.option("--stage", "names", multiple=True, metavar="NAME", help="Just this stage (repeat).")
@click.option("--from", "first", metavar="NAME", help="From this stage on.")
@click.option("--to", "last", metavar="NAME", help="Up to and with this stage.")
@click.option("--force", is_flag=True, help="Run the selected stages even if they are fresh.")
@click.option("--dry-run", is_flag=True, help="Say what would run and why; write nothing.")
@click.option(
    "--allow",
    multiple=True,
    metavar="gate=NAME[:WHY]",
    help="Go on although this gate says no; the manifest records it.",
)
@json_option
@debug_option
@click.pass_context
def run(
    context: click.Context,
    state: RunState,
    names: Sequence[str],
    first: str | None,
    last: str | None,
    force: bool,
    dry_run: bool,
    allow: Sequence[str],
    as_json: bool,
) -> None:
    """Run what is stale, in order; skip what is fresh."""
    stages = _select(tuple(state.stages), names, first, last)
    gates = [name for stage in state.stages.values() for name in stage.gate_names]
    reasons = _parse_allow(allow, gates)
    if dry_run:
        _dry_run(state, stages, force, as_json)
        return
    if is_follower():
        from pipeline.training.loop import take_part

        follow(state.folder, take_part)
        return
    debug = context.ensure_object(Switches).debug
    runner = Runner(state, echo=print_event, debug=debug)
    with leading(state.folder):
        ran = runner.run(stages, force=force, allow=reasons)
    report = _print_report(runner.state, bool(ran)) if "benchmark" in stages else None
    if as_json:
        print_json({"run": state.config.run, "ran": ran, "report": report})


@click.command()
@run_options
@click.option("--why", "stage", metavar="STAGE", help="Every reason of one stage, in full.")
@json_option
@debug_option
def status(state: RunState, stage: str | None, as_json: bool) -> None:
    """Say what is fresh, stale or failed, and why.

    Per stage one of fresh, stale, missing, running, failed and interrupted.
    """
    if stage is not None:
        _check_stage(stage, tuple(state.stages))
    examinations = state.examine()
    state.digests.save()
    if as_json:
        rows = {name: _as_json(examination) for name, examination in examinations.items()}
        print_json({"run": state.config.run, "stages": rows})
    elif stage is not None:
        examination = examinations[stage]
        click.echo(f"{stage} is {examination.state}")
        for line in [str(d) for d in examination.differences] or [examination.reason]:
            click.echo(f"  {line}")
    else:
        for name, examination in examinations.items():
            click.echo(f"{name:<10} {examination.state:<11} {shorten(examination.reason)}")


def _print_report(state: RunState, new: bool) -> str | None:
    """Print where the report is, with its figures where it is new; its path from here."""
    artifact = state.artifact("benchmark_report")
    if artifact is None:
        return None
    folder = state.folder / artifact.path
    if new:
        for line in summary_lines(parse_report((folder / "report.json").read_bytes())):
            print_event(f"  {line}")
    page = relative(folder / "report.html")
    print_event(f"report: {page}")
    return page


def _select(
    order: tuple[str, ...], names: Sequence[str], first: str | None, last: str | None
) -> list[str]:
    for name in [*names, *(n for n in (first, last) if n is not None)]:
        _check_stage(name, order)
    if names and (first or last):
        raise ConfigError("--stage stands alone; use it, or --from and --to")
    if names:
        return [name for name in order if name in names]
    start = order.index(first) if first else 0
    end = order.index(last) if last else len(order) - 1
    if start > end:
        raise ConfigError(f"--from {first} --to {last} is empty; the order is {' -> '.join(order)}")
    return list(order[start : end + 1])


def _check_stage(stage: str, order: tuple[str, ...]) -> None:
    if stage not in order:
        raise ConfigError(f"there is no stage {stage!r}{nearest(stage, order)}")


def _parse_allow(texts: Sequence[str], gates: Sequence[str]) -> dict[str, str]:
    """Name of a gate -> the user's reason, which may be empty."""
    reasons = {}
    for text in texts:
        match = re.fullmatch(r"gate=([A-Za-z0-9_]+)(?::(.*))?", text)
        if match is None:
            raise ConfigError(f"--allow {text!r}: write gate=NAME or gate=NAME:WHY")
        if match[1] not in gates:
            raise ConfigError(f"--allow: there is no gate {match[1]!r}{nearest(match[1], gates)}")
        reasons[match[1]] = match[2] or ""
    return reasons


def _dry_run(state: RunState, stages: Sequence[str], force: bool, as_json: bool) -> None:
    examinations = state.examine()
    rows: list[dict[str, Any]] = []
    for name in stages:
        examination = examinations[name]
        record = state.record(name)
        runs = force or examination.state != "fresh"
        rows.append(
            {
                "stage": name,
                "action": "run" if runs else "skip",
                **_as_json(examination),
                "inputs": {
                    i: artifact.sha256 if (artifact := state.artifact(i)) else None
                    for i in state.stages[name].inputs
                },
                "seconds_last_time": record.seconds if record and record.key else None,
            }
        )
    if as_json:
        print_json({"run": state.config.run, "plan": rows})
        return
    for row in rows:
        inputs = ", ".join(f"{n} {(d or 'none')[:8]}" for n, d in row["inputs"].items())
        seconds = row["seconds_last_time"]
        click.echo(
            f"{row['stage']:<10} {row['action']:<5} {row['state']}: {shorten(row['reason'])}"
            + (f"  [{inputs}]" if inputs else "")
            + (f"  (last time {seconds:.0f} s)" if seconds is not None else "")
        )


def _as_json(examination: Examination) -> dict[str, str]:
    return {"state": examination.state, "reason": examination.reason}
