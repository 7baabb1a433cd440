"""`kdpipe init`, `kdpipe convert` and `kdpipe synth`."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

import click

from pipeline.cli.debug import debug_option
from pipeline.cli.output import print_event
from pipeline.params import guides
from pipeline.run.config import DEFAULT_CONFIG
from pipeline.run.errors import ConfigError, InputError, nearest, require_extra


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@debug_option
def init(folder: Path) -> None:
    """Write a commented kdpipe.yaml into FOLDER, ready to edit."""
    target = folder / DEFAULT_CONFIG
    if target.exists():
        raise InputError(f"{target} exists; choose another folder, or edit that file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.write_text(files("pipeline").joinpath("templates/kdpipe.yaml").read_text())
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror}") from error
    click.echo(f"wrote {target}; fill in its paths, then:  cd {folder} && kdpipe run --dry-run")


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--alpha-is",
    type=click.Choice(["hard", "soft"]),
    help="Whose weight their alpha is: of the labels, or of the teacher.",
)
@click.option("--preset", help="Settings that guides recommend, instead of FILE.")
@debug_option
def convert(
    file: Path | None, alpha_is: Literal["hard", "soft"] | None, preset: str | None
) -> None:
    """Print settings of other distillation code as kdpipe's.

    FILE is a config.py or YAML of other code; what has no counterpart here is named.
    """
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
        print_event(f"no counterpart here: {name}")
    for remark in guides.unusual(section):
        print_event(f"note: {remark}")


@click.group()
def synth() -> None:
    """Make synthetic data, to try kdpipe with.

    Whatever is made of it says so: it is never taken for measured data.
    """


@synth.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--patches", type=click.IntRange(min=1), required=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of cities and patches.")
@debug_option
def so2sat(out: Path, patches: int, seed: int) -> None:
    """Write synthetic patches in the form of So2Sat LCZ42.

    OUT is an HDF5 file with sen1, sen2 and label. Two seeds are different cities of the same 17
    classes.
    """
    require_extra("data", "h5py")
    from pipeline.data.synthetic import write_so2sat
    from pipeline.run.attempt import progress_bar

    with progress_bar("synthetic patches", patches) as bar:
        write_so2sat(out, patches, seed, bar.update)
    click.echo(f"wrote {out}: {patches} synthetic patches, seed {seed}")
