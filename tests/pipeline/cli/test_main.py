"""The command line as a whole: its help, its words, its errors."""

import subprocess
import sys

import click
import pytest

from pipeline.cli.main import COMMANDS, RENAMED, commands, main
from pipeline.run.errors import GateError, InputError


def invoke(monkeypatch, capsys, *words):
    """Exit status and stderr of a command in this process."""
    monkeypatch.setattr("sys.argv", ["kdpipe", *words])
    with pytest.raises(SystemExit) as ending:
        main()
    return ending.value.code, capsys.readouterr().err


def every_command():
    context = click.Context(commands)
    for name in COMMANDS:
        command = commands.get_command(context, name)
        yield command
        yield from getattr(command, "commands", {}).values()


def test_the_list_of_commands_says_what_each_says_of_itself():
    context = click.Context(commands)
    for name, (_, line) in COMMANDS.items():
        command = commands.get_command(context, name)
        assert command.name == name
        assert command.get_short_help_str(limit=100) == line


def test_every_command_takes_debug():
    for command in every_command():
        if not isinstance(command, click.Group):
            assert "--debug" in [o for p in command.params for o in p.opts], command.name


@pytest.mark.parametrize("words", [["--debug", "status"], ["status", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_status(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, shown = invoke(monkeypatch, capsys, *words)
    assert status == 2
    assert shown.startswith("Traceback")
    assert shown.splitlines()[-1].startswith("Error: kdpipe.yaml does not exist")
    status, shown = invoke(monkeypatch, capsys, "status")
    assert (status, len(shown.splitlines())) == (2, 1)


class AnswerError(Exception):
    """As HTTP libraries have them."""

    def __init__(self):
        super().__init__("not found")
        self.status = 404


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (InputError("no file"), 3, "Error: no file\n"),
        (GateError("calibrate", "int8_loss", "too much", 4), 4, "Error: calibrate: gate int8_loss"),
        (
            GateError("benchmark", "verdict", "too short", 7),
            7,
            "Error: benchmark: gate verdict did",
        ),
        (AnswerError(), 1, "Error: AnswerError: not found\n  this is a bug in kdpipe; --debug"),
    ],
)
def test_an_error_carries_its_exit_status(error, status, shown, monkeypatch, capsys):
    def fail(*words, **options):
        raise error

    monkeypatch.setattr(commands, "main", fail)
    ended, text = invoke(monkeypatch, capsys)
    assert ended == status
    assert text.startswith(shown)


def test_a_misspelt_command_names_the_nearest(monkeypatch, capsys):
    status, shown = invoke(monkeypatch, capsys, "verfy")
    assert (status, shown) == (2, "Error: there is no command 'verfy'; did you mean 'verify'?\n")


def test_an_old_word_still_works_and_says_so(monkeypatch, capsys):
    assert RENAMED == {"calibrate": "curve"}
    status, shown = invoke(monkeypatch, capsys, "calibrate", "--sizes=1")
    assert status == 2
    first, second = shown.splitlines()
    assert first.startswith("`kdpipe calibrate` is now called `kdpipe curve`")
    assert second.startswith("Error: --sizes '1': write numbers from 2 on")
    assert "calibrate " not in commands.get_help(click.Context(commands))


@pytest.mark.parametrize("words", [[], ["synth"]])
def test_no_word_at_all_is_help(words, monkeypatch, capsys):
    status, shown = invoke(monkeypatch, capsys, *words)
    assert status == 2
    assert shown.startswith("Usage: ")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"]])
def test_help_is_light(words):
    """No heavy library is loaded before it is needed; time itself is no test."""
    code = (
        "import sys; from pipeline.cli.main import commands; "
        "commands.main(sys.argv[1:], standalone_mode=False); "
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'lightning', 'timm', 'matplotlib', "
        "'yaml', 'jinja2', 'tqdm', 'PIL'}; "
        "sys.exit('loaded: ' + ', '.join(heavy & sys.modules.keys()) if heavy & sys.modules.keys() "
        "else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                            check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_run_with_nothing_to_do_loads_nothing_heavy(finished):
    assert finished.kdpipe("run").returncode == 0
    code = (
        "import sys; from pipeline.cli.main import commands; "
        "commands.main(['run'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'numpy', 'onnx', 'onnxruntime'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=finished.root, check=False,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
