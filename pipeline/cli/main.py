"""The command line: words in, lines out.

Errors that users can cause, and the exit status each has (CONVENTIONS.md 1.2):

    ValueError
      ContractError       preprocessing/contract.py      3
      ConfigError         pipeline/run/errors.py         2
      InputError          pipeline/run/errors.py         3
      ManifestError       pipeline/run/manifest.py       3
      BusyError           pipeline/run/errors.py         3
    RuntimeError
      StageError          pipeline/run/errors.py         1
        KdbenchError      pipeline/delivery/device_run.py  that of kdbench.py
      ExtraMissingError   pipeline/run/errors.py         5
      GateError           pipeline/run/stage.py          4, or 7 for the benchmark's verdict
      ParityError         pipeline/run/errors.py         4
      RefusedError        pipeline/run/errors.py         4
      IncomparableError   pipeline/reports/compare_benchmarks.py  4
      BackendError        metis/backend.py               1
        BackendMissingError                              5
"""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from metis.backend import BackendError, BackendMissingError
from pipeline.reports.compare_benchmarks import IncomparableError
from pipeline.reports.report import parse_report, summary_lines
from pipeline.run.config import DEFAULT_CONFIG, load_config
from pipeline.run.errors import (
    BusyError,
    ConfigError,
    ExtraMissingError,
    InputError,
    ParityError,
    RefusedError,
    StageError,
    Terminated,
    nearest,
)
from pipeline.run.manifest import ManifestError
from pipeline.run.processes import follow, is_follower, leading
from pipeline.run.runner import Runner
from pipeline.run.stage import GateError
from pipeline.run.state import RunState
from pipeline.stages import load_stages
from preprocessing.contract import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.run.state import Examination


# The first match counts.
EXIT_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (ConfigError, 2),
    (ContractError, 3),
    (InputError, 3),
    (ManifestError, 3),
    (BusyError, 3),
    (ExtraMissingError, 5),
    (BackendMissingError, 5),
    (ParityError, 4),
    (RefusedError, 4),
    (IncomparableError, 4),
    (BackendError, 1),
    (StageError, 1),
)


def main() -> None:
    """Run the command line; every error that a user can cause is one line and an exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv
    try:
        # click returns what a command gave to ctx.exit.
        sys.exit(commands.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.exceptions.Abort as error:  # what click makes of KeyboardInterrupt
        terminated = isinstance(error.__cause__, Terminated)
        _fail("interrupted; `kdpipe run` does what is left", 143 if terminated else 130)
    except GateError as error:
        _fail(str(error), error.status)
    except Exception as error:
        if debug:
            raise
        for kind, status in EXIT_STATUS:
            if isinstance(error, kind):
                # kdbench's own exit status passes through
                _fail(str(error), getattr(error, "status", status))
        _fail(f"{type(error).__name__}: {error}\n  this is a bug in kdpipe; --debug shows where", 1)


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def _fail(message: str, status: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_config_options = _options(
    click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        default=DEFAULT_CONFIG,
        show_default=True,
        help="The kdpipe.yaml to follow.",
    ),
    click.option("--run", "run_name", metavar="NAME", help="Another run than the config names."),
    click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one value of the config: distill.epochs=20.",
    ),
)

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

_debug_option = click.option("--debug", is_flag=True, help="Show tracebacks; keep what failed.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 a stage failed, 2 wrong words or configuration, 3 an input, 4 a "
    "gate said no, 5 a tool is missing, 6 the device, 7 the benchmark is invalid, 130 interrupted.",
)
@click.version_option(package_name="kdpipe")
def commands() -> None:
    """From a teacher ensemble in ONNX to an int8 student on Axelera Metis, with proof."""


@commands.command()
@_config_options
@click.option("--stage", "only", multiple=True, metavar="NAME", help="Just this stage (repeat).")
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
@_json_option
@_debug_option
def run(
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    only: Sequence[str],
    first: str | None,
    last: str | None,
    force: bool,
    dry_run: bool,
    allow: Sequence[str],
    as_json: bool,
    debug: bool,
) -> None:
    """Run what is stale, in order; skip what is fresh."""
    stages = load_stages()
    selected = _select(tuple(stages), only, first, last)
    settings = load_config(config, stages, changes=changes, run=run_name)
    allowed = _allowed(allow, [name for stage in stages.values() for name in stage.gate_names])
    if dry_run:
        _dry_run(RunState(settings, stages), selected, force, as_json)
        return
    if is_follower():
        from pipeline.training.loop import take_part

        follow(settings.folder, take_part)
        return
    runner = Runner(settings, stages, echo=_to_stderr, debug=debug)
    with leading(settings.folder):
        ran = runner.run(selected, force=force, allow=allowed)
    report = runner.state.artifact("benchmark_report")
    shown = None
    if report and "benchmark" in selected:
        folder = settings.folder / report.path
        if ran:
            for line in summary_lines(parse_report((folder / "report.json").read_bytes())):
                _to_stderr(f"  {line}")
        shown = _beside_here(folder / "report.html")
        _to_stderr(f"report: {shown}")
    if as_json:
        _print_json({"run": settings.run, "ran": ran, "report": shown})


@commands.command(short_help="What is fresh, stale or failed, and why.")
@_config_options
@click.option("--why", metavar="STAGE", help="Every reason of one stage, in full.")
@_json_option
@_debug_option
def status(
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    why: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Per stage: fresh, stale, missing, running, failed or interrupted, and the reason."""
    stages = load_stages()
    if why is not None:
        _known(why, tuple(stages))
    settings = load_config(config, stages, changes=changes, run=run_name)
    state = RunState(settings, stages)
    examined = state.examine()
    state.digests.save()
    if as_json:
        _print_json(
            {"run": settings.run, "stages": {n: _described(e) for n, e in examined.items()}}
        )
    elif why is not None:
        examination = examined[why]
        click.echo(f"{why} is {examination.state}")
        for line in [str(d) for d in examination.differences] or [examination.reason]:
            click.echo(f"  {line}")
    else:
        for name, examination in examined.items():
            click.echo(f"{name:<10} {examination.state:<11} {_shorten(examination.reason)}")


@commands.command(short_help="Hash every artifact again.")
@_config_options
@click.option(
    "--parity",
    is_flag=True,
    help="Also prove that training tensor, PNG, YAML, ONNX and int8 agree, computed anew.",
)
@_json_option
@_debug_option
def verify(
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    parity: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Hash every artifact again and check the contract in all of them; name what differs."""
    from pipeline.parity.verify import verify_parity
    from pipeline.run.verification import verify_run

    stages = load_stages()
    settings = load_config(config, stages, changes=changes, run=run_name)
    state = RunState(settings, stages)
    result = verify_run(state)
    legs = verify_parity(state) if parity and not result.problems else []
    if as_json:
        document = {"run": settings.run, "checked": result.checked, "problems": result.problems}
        rows = [
            {**asdict(leg), "limit": limit, "passed": passed, "words": leg.words()}
            for leg, limit, passed in legs
        ]
        _print_json({**document, "parity": rows} if parity else document)
    else:
        click.echo(f"{result.checked} files of run {settings.run} checked")
        for problem in result.problems:
            click.echo(f"  {problem}")
        for leg, limit, passed in legs:
            word = {True: "passed", False: "FAILED", None: "-"}[passed]
            click.echo(f"{leg.name:<7} {word:<7} {leg.source} / {leg.target} (n {leg.n})")
            click.echo(f"        {leg.words()}" + (f"; limit {limit}" if limit else ""))
    if result.problems:
        raise ManifestError(
            f"{len(result.problems)} of the run's files are not what its manifest says: "
            f"{result.problems[0]}"
        )
    failed = [leg for leg, _, passed in legs if passed is False]
    if failed:
        raise ParityError("; ".join(f"parity, {leg.name}: {leg.words()}" for leg in failed))


@commands.command(short_help="Ask the teachers now, in parts.")
@_config_options
@click.option("--shard", metavar="I/N", default="1/1", help="Every N-th block, from the I-th on.")
@click.option("--check", is_flag=True, help="Say what is missing; ask nobody.")
@_debug_option
def label(
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    shard: str,
    check: bool,
    debug: bool,
) -> None:
    """Ask the teachers now, in several processes or machines; `kdpipe run` finds their answers.

    The answers lie in runs/.cache/labels. Machines without a common disk copy that folder together;
    --check tells when it is complete, and `kdpipe run` asks for whatever is missing.
    """
    from pipeline.run.attempt import job_outside_a_run
    from pipeline.stages.ingest import label_shard

    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--shard {shard!r}: write I/N with I from 1 to N, such as 2/4")
    stages = load_stages()
    state = RunState(load_config(config, stages, changes=changes, run=run_name), stages)
    part = None if check else (int(match[1]) - 1, int(match[2]))
    params = state.config.params["ingest"]
    stages["ingest"].ready(params)
    job = job_outside_a_run(state, "ingest", lambda words: _to_stderr(f"warning  {words}"))
    missing = 0
    for name, absent, blocks in label_shard(job, params, part):
        click.echo(f"{name:<10} {blocks - absent} of {blocks} blocks are there")
        missing += absent
    state.digests.save()
    if check and missing:
        raise InputError(f"{missing} blocks are missing; `kdpipe run` or another shard makes them")


@commands.command(short_help="int8 by number of calibration patches.")
@_config_options
@click.option("--sizes", default="16,64,256", show_default=True, help="Numbers of samples.")
@_json_option
@_debug_option
def calibrate(
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    sizes: str,
    as_json: bool,
    debug: bool,
) -> None:
    """What int8 keeps of the student with more and more calibration samples; writes nothing.

    Emulated on the host, on the validation split. `kdpipe run --stage calibrate` is what quantizes.
    """
    from pipeline.stages.calibrate import curve

    try:
        numbers = [int(word) for word in sizes.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 2:
        raise ConfigError(f"--sizes {sizes!r}: write numbers from 2 on, such as 16,64,256")
    stages = load_stages()
    settings = load_config(config, stages, changes=changes, run=run_name)
    runner = Runner(settings, stages, echo=_to_stderr, debug=debug)
    runner.require_inputs("calibrate")
    params = settings.params["calibrate"]
    rows = []
    for row in curve(runner.state.paths, params, settings.seed, numbers, lambda n: None):
        rows.append(row)
        if not as_json and len(rows) == 1:
            click.echo("samples  top-1   agreement  SQNR     on validation, host-emulation")
        if not as_json:
            sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
            click.echo(
                f"{row['samples']:>7}  {row['top1']:.4f}  {row['agreement']:9.1%}  {sqnr:<8} "
                f"n {row['n']}"
            )
    if as_json:
        _print_json({"run": settings.run, "curve": rows})


@commands.command(short_help="Write the folder that travels to a device.")
@click.argument("dest", type=click.Path(path_type=Path))
@_config_options
@click.option("--tar", is_flag=True, help="Also write DEST.tar.gz; its bytes depend on DEST alone.")
@_debug_option
def bundle(
    dest: Path,
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    tar: bool,
    debug: bool,
) -> None:
    """Write the folder that travels to the device: compiled model, checks, kdbench.py.

    It needs Python, numpy and the model's runtime there, and nothing of kdpipe.
    """
    from pipeline.delivery.bundle import pack_bundle, write_whole

    stages = load_stages()
    settings = load_config(config, stages, changes=changes, run=run_name)
    runner = Runner(settings, stages, echo=_to_stderr, debug=debug)
    runner.require_inputs("benchmark")
    written = write_whole(runner.state, dest)
    click.echo(f"wrote {_beside_here(dest)}: {written} files; start with python3 kdbench.py there")
    if tar:
        archive = dest.with_name(f"{dest.name}.tar.gz")
        click.echo(f"wrote {_beside_here(archive)}: sha256 {pack_bundle(dest, archive)}")


@commands.command(short_help="The float student for other runtimes.")
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
@_config_options
@_json_option
@_debug_option
def export(
    dest: Path,
    formats: Sequence[str],
    config: Path,
    run_name: str | None,
    changes: Sequence[str],
    as_json: bool,
    debug: bool,
) -> None:
    """Write the float student for runtimes other than the chip's; each file is compared first.

    For a Metis card use `kdpipe bundle`. dynamic-int8 rounds the weights of linear layers alone,
    which is little of a convolutional network; the sizes show how little.
    """
    from pipeline.delivery.other_runtimes import export_formats

    stages = load_stages()
    settings = load_config(config, stages, changes=changes, run=run_name)
    runner = Runner(settings, stages, echo=_to_stderr, debug=debug)
    runner.require_inputs("calibrate")
    written = export_formats(runner.state, dest, dict.fromkeys(formats))
    if as_json:
        _print_json({"run": settings.run, "files": [asdict(entry) for entry in written]})
        return
    click.echo("format        bytes       largest difference  same class  top-1    of logits, host")
    for entry in written:
        click.echo(
            f"{entry.format:<12}  {entry.bytes:>10,}  {entry.max_abs_logit_difference:>18.2g}  "
            f"{entry.top1_agreement:>10.2%}  {entry.top1_val:.4f}   n {entry.n_val}"
        )
    click.echo(f"wrote {_beside_here(dest)}")


@commands.command(short_help="Runs in one table, or two benchmarks.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The kdpipe.yaml beside whose runs/ folder these runs lie.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default runs/comparison.")
@_debug_option
def compare(runs: Sequence[str], config: Path, out: Path | None, debug: bool) -> None:
    """Teachers, ensemble, students and baselines of runs in one table: CSV, Markdown, PNG.

    Runs that differ in nothing but their seed become mean and standard deviation. Two files
    report.json instead of runs: what their benchmarks measured, second against first, or why that
    can't be compared.
    """
    files = [Path(name) for name in runs if name.endswith(".json")]
    if files:
        _compare_reports(files, runs)
        return
    from pipeline.reports.compare_runs import read_run, summarize, write_comparison

    root = config.parent
    rows = []
    for name in dict.fromkeys(runs):
        folder = root / "runs" / name
        if not folder.is_dir():
            known = sorted(p.parent.name for p in (root / "runs").glob("*/manifest.json"))
            raise InputError(f"there is no run {name!r}{nearest(name, known)}")
        rows += read_run(folder, root)
    target = out or root / "runs" / "comparison"
    try:
        click.echo(write_comparison(summarize(rows), target), nl=False)
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error
    names = "comparison.csv, comparison.md, comparison.png, confusion.csv, confusion.png"
    _to_stderr(f"wrote {names}, decisions.csv in {_beside_here(target)}")


@commands.command(short_help="Can the chip run this network?")
@click.argument("model", metavar="MODEL.onnx|ARCH")
@click.option("--size", type=click.IntRange(min=1), help="Input side of ARCH.  [default: 224]")
@click.option(
    "--channels", type=click.IntRange(min=1), default=3, show_default=True, help="Of ARCH's input."
)
@click.option(
    "--write",
    "target",
    type=click.Path(path_type=Path),
    metavar="OUT.onnx",
    help="Write the rewritten graph.",
)
@_json_option
@_debug_option
def check(
    model: str, size: int | None, channels: int, target: Path | None, as_json: bool, debug: bool
) -> None:
    """Can Metis run this ONNX graph, or this network of timm? Node by node, with rule and cure.

    Exact rewrites are done first, proven and listed; a graph that is refused all the same ends
    with status 4.
    """
    from pipeline.networks import chip_check

    legalized = chip_check.check(model, size=size, channels=channels)
    if as_json:
        _print_json(chip_check.document(model, legalized))
    else:
        for line in chip_check.lines(legalized):
            click.echo(line)
    if target is not None:
        chip_check.write(legalized, target)
        _to_stderr(f"wrote {target}")
    refusal = legalized.refusal(model)
    if refusal:
        raise RefusedError(refusal)


@commands.command(short_help="How fast would it be on a card?")
@click.argument("model", metavar="MODEL.onnx|ARCH")
@click.option("--size", type=click.IntRange(min=1), help="Input side of ARCH.  [default: 224]")
@click.option(
    "--channels", type=click.IntRange(min=1), default=3, show_default=True, help="Of ARCH's input."
)
@click.option(
    "--aipu-cores",
    type=click.IntRange(1, 4),
    default=1,
    show_default=True,
    help="Cores of one compiled model; also the frames of one call.",
)
@click.option("--no-replication", is_flag=True, help="As with the compiler's enable_icr off.")
@click.option(
    "--layers",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="How many layers to name, slowest first; 0: all.",
)
@_json_option
@_debug_option
def estimate(
    model: str,
    size: int | None,
    channels: int,
    aipu_cores: int,
    no_replication: bool,
    layers: int,
    as_json: bool,
    debug: bool,
) -> None:
    """How fast would this ONNX graph, or this network of timm, run on a Metis card?

    An estimate from the graph alone, with its error band, per layer what dominates, and words
    where the cost model is known to miss. Nothing is measured.
    """
    from metis.estimate.cost_model import Settings, published_row
    from metis.estimate.estimator import estimate as estimate_graph
    from pipeline.networks import chip_check
    from pipeline.networks.names import ALIASES

    legalized = chip_check.check(model, size=size, channels=channels)
    found = estimate_graph(legalized.model, Settings(aipu_cores, not no_replication))
    published = published_row(ALIASES.get(model, (model, size))[0])
    if as_json:
        vendor = published.facts() if published else None
        facts = found.facts(layers or None)
        _print_json({"model": model, "estimate": facts, "published": vendor})
        return
    for line in (*found.lines(layers or None), *([published.line()] if published else [])):
        click.echo(line)


@commands.command(short_help="Versions, SDK and device of this machine.")
@_json_option
@_debug_option
def doctor(as_json: bool, debug: bool) -> None:
    """Versions of everything that matters; what of the SDK and the device is here."""
    from pipeline.delivery.doctor import examine_machine

    found = examine_machine()
    if as_json:
        _print_json(found)
        return
    for section, entries in found.items():
        click.echo(section)
        for name, value in entries.items():
            click.echo(f"  {name:<16} {value}")


@commands.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_debug_option
def init(folder: Path, debug: bool) -> None:
    """Write a commented kdpipe.yaml into FOLDER, ready to edit."""
    from importlib.resources import files

    target = folder / DEFAULT_CONFIG
    if target.exists():
        raise InputError(f"{target} exists; choose another folder, or edit that file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(files("pipeline").joinpath("templates/kdpipe.yaml").read_text())
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}") from error
    click.echo(f"wrote {target}; fill in its paths, then:  cd {folder} && kdpipe run --dry-run")


@commands.command(short_help="Somebody's settings as kdpipe's own.")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--alpha-is",
    type=click.Choice(["hard", "soft"]),
    help="Whose weight their alpha is: of the labels, or of the teacher.",
)
@click.option("--preset", help="Settings that guides recommend, instead of FILE.")
@_debug_option
def convert(
    file: Path | None,
    alpha_is: Literal["hard", "soft"] | None,
    preset: str | None,
    debug: bool,
) -> None:
    """Print the distillation settings of somebody's config.py or YAML as kdpipe's own."""
    from pipeline.params import guides

    if (file is None) == (preset is None):
        raise ConfigError("name a FILE or a --preset, one of both")
    unknown: list[str] = []
    if file is not None:
        section, unknown = guides.convert(file, alpha_is)
    elif preset in guides.PRESETS:
        section = guides.preset(preset)
    else:
        raise ConfigError(f"there is no preset {preset!r}{nearest(str(preset), guides.PRESETS)}")
    click.echo("distill:")
    for key, value in section.items():
        click.echo(f"  {key}: {json.dumps(value)}")
    for name in unknown:
        _to_stderr(f"no counterpart here: {name}")
    for words in guides.unusual(section):
        _to_stderr(f"note: {words}")


@commands.group(short_help="Make synthetic data, to try kdpipe with.")
def synth() -> None:
    """Make synthetic data, for tests and for trying kdpipe; never measured data."""


@synth.command(short_help="In the form of So2Sat LCZ42.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--patches", type=click.IntRange(min=1), required=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of cities and patches.")
@_debug_option
def so2sat(out: Path, patches: int, seed: int, debug: bool) -> None:
    """Write synthetic patches in the form of So2Sat LCZ42 (sen1, sen2, label) to OUT, an HDF5 file.

    Two seeds are different cities of the same 17 classes.
    """
    from tqdm import tqdm

    from pipeline.data.synthetic import write_so2sat

    if out.exists():
        raise InputError(f"{out} exists; choose another name")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with tqdm(total=patches, desc="synthetic patches", disable=None, leave=False) as bar:
            write_so2sat(partial, patches, seed, bar.update)
        partial.replace(out)
    except OSError as error:
        raise InputError(f"can't write {out}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    click.echo(f"wrote {out}: {patches} synthetic patches, seed {seed}")


def _compare_reports(files: Sequence[Path], words: Sequence[str]) -> None:
    from pipeline.reports.compare_benchmarks import compare_reports, comparison_lines, load_measured

    if len(files) != 2 or len(words) != 2:
        raise ConfigError(f"give two report.json, or names of runs; not {', '.join(words)}")
    first, second = (load_measured(path) for path in files)
    for line in comparison_lines(first, second, compare_reports(first, second)):
        click.echo(line)


def _select(
    order: tuple[str, ...], only: Sequence[str], first: str | None, last: str | None
) -> list[str]:
    for name in [*only, *(n for n in (first, last) if n is not None)]:
        _known(name, order)
    if only and (first or last):
        raise ConfigError("--stage stands alone; use it, or --from and --to")
    if only:
        return [name for name in order if name in only]
    start = order.index(first) if first else 0
    end = order.index(last) if last else len(order) - 1
    if start > end:
        raise ConfigError(f"--from {first} --to {last} is empty; the order is {' -> '.join(order)}")
    return list(order[start : end + 1])


def _known(stage: str, order: tuple[str, ...]) -> None:
    if stage not in order:
        raise ConfigError(f"there is no stage {stage!r}{nearest(stage, order)}")


def _allowed(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    result = {}
    for word in words:
        match = re.fullmatch(r"gate=([A-Za-z0-9_]+)(?::(.*))?", word)
        if match is None:
            raise ConfigError(f"--allow {word!r}: write gate=NAME or gate=NAME:WHY")
        if match[1] not in known:
            raise ConfigError(f"--allow: there is no gate {match[1]!r}{nearest(match[1], known)}")
        result[match[1]] = match[2] or ""
    return result


def _dry_run(state: RunState, selected: Sequence[str], force: bool, as_json: bool) -> None:
    examined = state.examine()
    rows: list[dict[str, Any]] = []
    for name in selected:
        examination = examined[name]
        record = state.record(name)
        runs = force or examination.state != "fresh"
        rows.append(
            {
                "stage": name,
                "action": "run" if runs else "skip",
                **_described(examination),
                "inputs": {
                    i: artifact.sha256 if (artifact := state.artifact(i)) else None
                    for i in state.stages[name].inputs
                },
                "seconds_last_time": record.seconds if record and record.key else None,
            }
        )
    if as_json:
        _print_json({"run": state.config.run, "plan": rows})
        return
    for row in rows:
        inputs = ", ".join(f"{n} {(d or 'none')[:8]}" for n, d in row["inputs"].items())
        seconds = row["seconds_last_time"]
        click.echo(
            f"{row['stage']:<10} {row['action']:<5} {row['state']}: {_shorten(row['reason'])}"
            + (f"  [{inputs}]" if inputs else "")
            + (f"  (last time {seconds:.0f} s)" if seconds is not None else "")
        )


def _described(examination: Examination) -> dict[str, str]:
    return {"state": examination.state, "reason": examination.reason}


def _shorten(words: str) -> str:
    """Digests cut to twelve digits, for people."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", words)


def _beside_here(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _to_stderr(line: str) -> None:
    click.echo(_shorten(line), err=True)


def _print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))
