"""What is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import longmem.progress
from longmem.cli.common import ShownProgress, one_line, print_columns, print_json
from longmem.store.records import Progress


def test_columns_are_aligned_and_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_columns(("name", "tokens"), [("a" * 300, 5), ("b", 12345)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "a" * 300 + "       5"
    assert lines[2] == "b" + " " * 299 + "  12,345"
    print_columns(("name", "metadata"), [("a", "two\nlines \x1b[31m")])
    assert capsys.readouterr().out.splitlines()[1:] == ["a     two lines ·[31m"]


def test_text_from_a_store_cannot_command_a_terminal() -> None:
    assert one_line("a\n\tb \x1b[31mred\x07") == "a b ·[31mred·"


def test_records_and_paths_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({1: (2, [3.5]), "p": Progress("encode", 1, None, "tokens", "x"), "path": Path("a/b")})
    assert json.loads(capsys.readouterr().out) == {
        "1": [2, [3.5]],
        "p": {"step": "encode", "done": 1, "total": None, "unit": "tokens", "name": "x"},
        "path": "a/b",
    }


def test_progress_is_a_line_on_stderr_for_every_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longmem.progress, "EVERY", {True: 0.0, False: 0.0})
    with ShownProgress() as progress:
        progress(Progress("encode", 2000, None, "tokens", "b.txt"))
        progress(Progress("check", 5, 5000, "bytes", "c"))
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert (out, first) == ("", "encoding: 2,000 tokens in 0 s, b.txt")
    assert second.startswith("checking: 5 of 5,000 bytes (0 %)")
