"""The command line's frame: what every command shares."""

from __future__ import annotations

import errno
from pathlib import Path

import click
import pytest

from longmem.cli import main as frame
from longmem.errors import ConfigError, LongMemError

WAY_OUT = "check the path, its permissions and the space that is left"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        frame.main([*map(str, arguments)])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", list(frame.COMMANDS))
def test_each_command_is_in_the_list_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert f"{name} " in shown and frame.COMMANDS[name][1] in shown
    assert run(name, "--help") == 0
    assert f"Usage: longmem {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (LongMemError("notes.txt is empty; name a text"), 1, "error: notes.txt is empty; name a text"),
        (ConfigError(["a (1) must be 2", "b (3) must be 4"]), 1, "error: a (1) must be 2; b (3) must be 4"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space", "x.json"), 1, f"error: x.json: No space; {WAY_OUT}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_expected_error_is_one_line_on_stderr(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(frame.pkgutil, "resolve_name", lambda name: click.Command("act", callback=fail))
    assert run("demo") == status
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", line)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    act = click.Command("act", callback=lambda: 1 // 0)
    monkeypatch.setattr(frame.pkgutil, "resolve_name", lambda name: act)
    with pytest.raises(ZeroDivisionError):
        frame.main(["demo"])


def test_an_unknown_command_is_refused_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("remember") == 2
    assert "No such command 'remember'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["eval perplexity", "eval chapterbreak", "eval icl", "eval squad", "eval needle", "eval dialogue", "eval harness",
     "report", "demo", "layers"],
)  # fmt: skip
def test_a_file_where_a_folder_should_be_is_named_before_hours_have_passed(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / "x"
    assert run(*command.split(), "--out", out) == 1
    assert capsys.readouterr() == ("", (
        f"error: --out ({out}): {tmp_path}/taken is not such a folder; name a folder that can be written in, or a new "
        "one\n"
    ))  # fmt: skip
