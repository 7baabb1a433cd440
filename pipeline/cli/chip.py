"""`kdpipe check` and `kdpipe estimate`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.debug import debug_option
from pipeline.cli.options import json_option
from pipeline.cli.output import print_event, print_json
from pipeline.run.errors import RefusedError

_model_argument = click.argument("model", metavar="MODEL.onnx|ARCH")

_size_option = click.option(
    "--size", type=click.IntRange(min=1), help="Input side of ARCH.  [default: 224]"
)

_channels_option = click.option(
    "--channels", type=click.IntRange(min=1), default=3, show_default=True, help="Of ARCH's input."
)


@click.command()
@_model_argument
@_size_option
@_channels_option
@click.option(
    "--write",
    "target",
    type=click.Path(path_type=Path),
    metavar="OUT.onnx",
    help="Write the rewritten graph.",
)
@json_option
@debug_option
def check(model: str, size: int | None, channels: int, target: Path | None, as_json: bool) -> None:
    """Say whether the chip can run a network.

    The network is an ONNX file or a name that timm knows. Exact rewrites are done first, proven and
    listed. What the chip can't run is listed node by node, with the rule and a cure; then the exit
    status is 4.
    """
    from pipeline.networks import chip_check

    legalized = chip_check.check(model, size=size, channels=channels)
    if as_json:
        print_json(chip_check.document(model, legalized))
    else:
        for line in chip_check.lines(legalized):
            click.echo(line)
    if target is not None:
        chip_check.write(legalized, target)
        print_event(f"wrote {target}")
    refusal = legalized.refusal(model)
    if refusal:
        raise RefusedError(refusal)


@click.command()
@_model_argument
@_size_option
@_channels_option
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
@json_option
@debug_option
def estimate(
    model: str,
    size: int | None,
    channels: int,
    aipu_cores: int,
    no_replication: bool,
    layers: int,
    as_json: bool,
) -> None:
    """Estimate how fast a network would run on a card.

    The network is an ONNX file or a name that timm knows. Frame rates are estimated from the graph
    alone, with their error band, what dominates per layer, and a note where the cost model is known
    to miss. Nothing is measured.
    """
    from pipeline.networks.frame_rate import estimate_frame_rate

    rate = estimate_frame_rate(
        model, size=size, channels=channels, aipu_cores=aipu_cores, replication=not no_replication
    )
    if as_json:
        print_json(rate.document(layers or None))
        return
    for line in rate.lines(layers or None):
        click.echo(line)
