"""Where a command is told to write is looked at first: one line, before a model is loaded or hours have passed."""

from __future__ import annotations

import errno
import types
from pathlib import Path

import pytest

from longmem.cli import main as frame

COMMANDS = [
    "eval perplexity", "eval chapterbreak", "eval icl", "eval squad", "eval needle", "eval dialogue",
    "eval harness", "report", "demo", "layers",
]  # fmt: skip


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as done:
        frame.main([str(argument) for argument in arguments])
    assert done.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_where_a_folder_should_be_is_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / "x"
    assert error_of(capsys, *command.split(), "--out", out) == (
        f"--out ({out}): {tmp_path}/taken is not a folder; name a folder, or a new one"
    )
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/records.jsonl")

    act = frame.click.Command("act", callback=fail)
    monkeypatch.setitem(frame.COMMANDS, "act", frame.Entry("act_module", "Act."))
    monkeypatch.setattr(frame.importlib, "import_module", lambda name: types.SimpleNamespace(command=act))
    assert error_of(capsys, "act") == (
        "out/records.jsonl: No space left on device; check the path, its permissions and the space that is left"
    )
