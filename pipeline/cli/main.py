"""The command line: words in, lines out. A command's file is imported when the command is called.

Every error that a user can cause carries its exit status, see `pipeline.run.errors`; anything else
is a bug, and says so.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from pipeline.cli.debug import Switches, debug_option
from pipeline.run.errors import GateError, Terminated, nearest

if TYPE_CHECKING:
    from typing import NoReturn


#: Command -> where it is, and its line in `kdpipe --help`.
COMMANDS = {
    "init": ("project:init", "Write a commented kdpipe.yaml into FOLDER, ready to edit."),
    "run": ("run:run", "Run what is stale, in order; skip what is fresh."),
    "status": ("run:status", "Say what is fresh, stale or failed, and why."),
    "verify": ("inspect:verify", "Hash every artifact again, and name what differs."),
    "compare": ("student:compare", "Put runs into one table, or compare two benchmarks."),
    "curve": ("student:curve", "Show int8 accuracy by number of calibration patches."),
    "export": ("student:export", "Write the float student for other runtimes."),
    "bundle": ("device:bundle", "Write the folder that travels to a device."),
    "check": ("chip:check", "Say whether the chip can run a network."),
    "estimate": ("chip:estimate", "Estimate how fast a network would run on a card."),
    "label": ("teachers:label", "Ask the teachers now, in parts."),
    "convert": ("project:convert", "Print settings of other distillation code as kdpipe's."),
    "synth": ("project:synth", "Make synthetic data, to try kdpipe with."),
    "doctor": ("inspect:doctor", "Show versions, SDK and device of this machine."),
}

#: A command's word in the last release -> its word now.
RENAMED = {"calibrate": "curve"}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a project's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; its file is imported now."""
        name = RENAMED.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        if name != cmd_name:
            click.echo(
                f"`kdpipe {cmd_name}` is now called `kdpipe {name}`; the next release no longer "
                "knows the old word",
                err=True,
            )
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(f"pipeline.cli.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names; an error names the nearest one."""
        name = args[0]
        if name not in (*COMMANDS, *RENAMED) and not name.startswith("-"):
            ctx.fail(f"there is no command {name!r}{nearest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 a stage failed, 2 wrong words or configuration, 3 an input, 4 a "
    "gate said no, 5 a tool is missing, 6 the device, 7 the benchmark is invalid, 130 interrupted.",
)
@click.version_option(package_name="kdpipe")
@debug_option
def commands() -> None:
    """From a teacher ensemble in ONNX to an int8 student on Axelera Metis, with proof."""


def main() -> None:
    """Run the command line; every error that a user can cause is one line and an exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    switches = Switches()
    try:
        # click returns what a command gave to ctx.exit.
        sys.exit(commands.main(prog_name="kdpipe", standalone_mode=False, obj=switches) or 0)
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:  # from click 8.2 on
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.exceptions.Abort as error:  # what click makes of KeyboardInterrupt
        terminated = isinstance(error.__cause__, Terminated)
        _fail("interrupted; `kdpipe run` does what is left", 143 if terminated else 130)
    except Exception as error:  # noqa: BLE001 - whatever it is, it gets its line
        # A gate's no is a result, not an accident.
        if switches.debug and not isinstance(error, GateError):
            sys.excepthook(*sys.exc_info())
        # On the class, so that the status of somebody's HTTP error is not taken for ours.
        if isinstance(getattr(type(error), "status", None), int):
            _fail(str(error), error.status)  # type: ignore[attr-defined]
        _fail(f"{type(error).__name__}: {error}\n  this is a bug in kdpipe; --debug shows where", 1)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)
