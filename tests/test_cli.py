"""The command line's frame: what every command shares."""

from __future__ import annotations

import types

import click
import pytest

from longmem.cli import main as frame
from longmem.errors import ConfigError, LongMemError


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        frame.main(arguments)
    return int(stop.value.code or 0)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A command ``longmem act`` whose body each test chooses."""
    body = types.SimpleNamespace(run=lambda: None)
    act = click.Command("act", callback=lambda: body.run())
    monkeypatch.setitem(frame.COMMANDS, "act", frame.Entry("act_module", "Act."))
    monkeypatch.setattr(frame.importlib, "import_module", lambda name: types.SimpleNamespace(command=act))
    return body


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("name", list(frame.COMMANDS))
def test_each_command_has_help_that_begins_with_its_line_in_the_list(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    assert f"Usage: longmem {name}" in capsys.readouterr().out


def test_the_list_says_of_the_demo_what_its_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    run(["demo", "--help"])
    assert frame.COMMANDS["demo"].summary in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and entry.summary in shown for name, entry in frame.COMMANDS.items())


def test_an_expected_error_is_one_line_on_stderr_and_status_1(
    command: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = lambda: _raise(LongMemError("notes.txt is empty; name a file with text"))
    assert run(["act"]) == 1
    assert capsys.readouterr() == ("", "error: notes.txt is empty; name a file with text\n")


def test_all_problems_of_a_config_come_together(
    command: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = lambda: _raise(ConfigError(["a (1) must be 2", "b (3) must be 4"]))
    assert run(["act"]) == 1
    assert capsys.readouterr().err == "error: a (1) must be 2; b (3) must be 4\n"


def test_ctrl_c_ends_without_a_traceback(command: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = lambda: _raise(KeyboardInterrupt())
    assert run(["act"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_bug_is_not_hidden(command: types.SimpleNamespace) -> None:
    command.run = lambda: _raise(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        frame.main(["act"])


def test_an_unknown_command_is_refused_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["remember"]) == 2
    assert "No such command 'remember'" in capsys.readouterr().err
