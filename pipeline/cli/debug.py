"""`--debug`: an option of every command, and where the command line looks for it afterwards."""

from __future__ import annotations

import click


class Switches:
    """What a user asked of the whole command line; click carries it as the context's object."""

    def __init__(self) -> None:
        self.debug = False


def _switch(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Switches).debug = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,  # before other words can be wrong
    expose_value=False,
    callback=_switch,
    help="Show the traceback of an error; keep what a failed stage left.",
)
