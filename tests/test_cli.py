"""The command line's frame: what every command shares."""

import errno
from pathlib import Path

import click
import pytest
from tests.calling import Command

from longmem import __main__ as frame
from longmem.errors import ConfigError, LongMemError

WAY_OUT = "check the path, its permissions and the space that is left"


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
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setitem(frame.cli.commands, "demo", click.Command("act", callback=fail))
    done = command("demo")
    assert (done.status, done.out, done.err.strip()) == (status, "", line)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frame.cli.commands, "demo", click.Command("act", callback=lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        frame.main(["demo"])


@pytest.mark.parametrize("name", ["eval perplexity", "eval needle", "report", "demo", "layers"])
def test_a_file_where_a_folder_should_be_is_named_before_hours_have_passed(
    name: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / "x"
    done = command(*name.split(), "--out", out)
    line = f"--out ({out}): {tmp_path}/taken is not such a folder; name a folder that can be written in, or a new one"
    assert done == (1, "", f"error: {line}\n")
