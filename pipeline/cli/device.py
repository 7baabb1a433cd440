"""`kdpipe bundle`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.debug import debug_option
from pipeline.cli.options import run_options
from pipeline.cli.output import relative

if TYPE_CHECKING:
    from pipeline.run.state import RunState


@click.command()
@click.argument("dest", type=click.Path(path_type=Path))
@run_options
@click.option("--tar", is_flag=True, help="Also write DEST.tar.gz; its bytes depend on DEST alone.")
@debug_option
def bundle(state: RunState, dest: Path, tar: bool) -> None:
    """Write the folder that travels to a device.

    It holds the compiled model, checks and kdbench.py, and needs Python, numpy and the model's
    runtime there, and nothing of kdpipe.
    """
    from pipeline.delivery.bundle import pack_bundle, write_whole

    state.require_inputs("benchmark")
    count = write_whole(state, dest)
    click.echo(f"wrote {relative(dest)}: {count} files; start with python3 kdbench.py there")
    if tar:
        archive = dest.with_name(f"{dest.name}.tar.gz")
        click.echo(f"wrote {relative(archive)}: sha256 {pack_bundle(dest, archive)}")
