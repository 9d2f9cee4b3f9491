"""The command moe-ep: choosing a command, errors as one line, exit codes."""

import importlib
import subprocess
import sys
import types

import pytest

from moe_ep import cli
from moe_ep.errors import InvalidInput


@pytest.fixture
def fake_command(monkeypatch):
    """A command `fake` whose run calls the function set as its `action`."""
    module = types.ModuleType("moe_ep_fake_command")
    module.HELP = "A command for tests."
    module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=1)
    module.run = lambda args: module.action(args)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command(module.__name__, "for tests"))
    return module


def test_help_lists_every_command_without_importing_one():
    code = (
        "import sys; from moe_ep import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "assert not {each.module for each in cli.COMMANDS.values()} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in cli.COMMANDS.items():
        assert name in done.stdout and command.summary in done.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_describes_itself(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name].module)
    with pytest.raises(SystemExit) as exited:
        cli.main([name, "--help"])
    assert exited.value.code == 0
    assert module.HELP.split()[0] in capsys.readouterr().out


def test_arguments_and_exit_code_pass_through(fake_command):
    fake_command.action = lambda args: args.number
    assert cli.main(["fake", "--number", "7"]) == 7


def test_own_errors_are_one_line_and_code_2(fake_command, capsys):
    def action(args):
        raise InvalidInput("number is 1;\n  allowed are 2 to 3")

    fake_command.action = action
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "moe-ep: error: number is 1; allowed are 2 to 3\n"


def test_other_errors_keep_their_traceback(fake_command):
    def action(args):
        raise ZeroDivisionError

    fake_command.action = action
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_interrupt_is_code_130(fake_command):
    def action(args):
        raise KeyboardInterrupt

    fake_command.action = action
    assert cli.main(["fake"]) == 130


@pytest.mark.parametrize("argv", [[], ["unknown"], ["doctor", "--unknown"]])
def test_bad_usage_is_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(argv)
    assert exited.value.code == 2
    assert "usage: moe-ep" in capsys.readouterr().err
