"""`kdpipe curve`, `kdpipe export` and `kdpipe compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pipeline.cli.debug import debug_option
from pipeline.cli.options import config_option, json_option, run_options
from pipeline.cli.output import print_event, print_json, relative
from pipeline.run.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.run.state import RunState


def _parse_sizes(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 2:
        raise ConfigError(f"--sizes {text!r}: write numbers from 2 on, such as 16,64,256")
    return sizes


@click.command()
@run_options
@click.option(
    "--sizes",
    default="16,64,256",
    show_default=True,
    callback=_parse_sizes,
    help="Numbers of samples.",
)
@json_option
@debug_option
def curve(state: RunState, sizes: list[int], as_json: bool) -> None:
    """Show int8 accuracy by number of calibration patches.

    Emulated on the host, on the validation split. It writes nothing: `kdpipe run --stage calibrate`
    is what quantizes.
    """
    from pipeline.calibration.curve import int8_curve

    rows: list[dict[str, Any]] = []
    for samples, facts in int8_curve(state, sizes):
        if not as_json and not rows:
            click.echo("samples  top-1   agreement  SQNR     on validation, host-emulation")
        rows.append({"samples": samples, **msgspec.to_builtins(facts)})
        if not as_json:
            sqnr = "exact" if facts.sqnr_db is None else f"{facts.sqnr_db:.1f} dB"
            click.echo(
                f"{samples:>7}  {facts.score:.4f}  {facts.agreement:9.1%}  {sqnr:<8} n {facts.n}"
            )
    if as_json:
        print_json({"run": state.config.run, "curve": rows})


@click.command()
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "formats",
    type=click.Choice(["onnx", "torchscript", "tflite", "dynamic-int8"]),
    multiple=True,
    default=("onnx", "torchscript", "dynamic-int8"),
    show_default=True,
    help="May be given several times; tflite needs the extra `tflite`.",
)
@run_options
@json_option
@debug_option
def export(state: RunState, dest: Path, formats: Sequence[str], as_json: bool) -> None:
    """Write the float student for other runtimes.

    Each file is compared with the ONNX student first. dynamic-int8 rounds the weights of linear
    layers alone, which is little of a convolutional network; the sizes show how little. For a Metis
    card use `kdpipe bundle`.
    """
    from pipeline.delivery.other_runtimes import export_formats

    state.require_inputs("calibrate")
    files = export_formats(state, dest, dict.fromkeys(formats))
    if as_json:
        print_json({"run": state.config.run, "files": msgspec.to_builtins(files)})
        return
    click.echo("format        bytes       largest difference  same class  top-1    of logits, host")
    for file in files:
        click.echo(
            f"{file.format:<12}  {file.bytes:>10,}  {file.max_abs_logit_difference:>18.2g}  "
            f"{file.agreement:>10.2%}  {file.score:.4f}   n {file.n_val}"
        )
    click.echo(f"wrote {relative(dest)}")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@config_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default runs/comparison.")
@debug_option
def compare(runs: Sequence[str], config: Path, out: Path | None) -> None:
    """Put runs into one table, or compare two benchmarks.

    Runs lie in the folder runs/ beside the config. The table has their teachers, ensembles,
    students and baselines, as CSV, Markdown and PNG. Runs that differ in nothing but their seed
    become mean and standard deviation.

    Two files report.json instead of runs: what their benchmarks measured, second against first, or
    why that can't be compared.
    """
    reports = [Path(name) for name in runs if name.endswith(".json")]
    if reports:
        if len(reports) != 2 or len(runs) != 2:
            raise ConfigError(f"give two report.json, or names of runs; not {', '.join(runs)}")
        from pipeline.reports.compare_benchmarks import compare_files

        for line in compare_files(*reports):
            click.echo(line)
        return
    from pipeline.reports.compare_runs import compare_runs

    folder = out or config.parent / "runs" / "comparison"
    click.echo(compare_runs(dict.fromkeys(runs), config.parent, folder), nl=False)
    names = "comparison.csv, comparison.md, comparison.png, confusion.csv, confusion.png"
    print_event(f"wrote {names}, decisions.csv in {relative(folder)}")
