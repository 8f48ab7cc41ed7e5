"""Python source as documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longmem.cli.main import main
from longmem.data.python_source import FILE_LINE, documents_of, package_text, write_source
from longmem.data.text import read_documents
from longmem.errors import DataError


def make_library(folder: Path, names: list[str]) -> Path:
    for name in names:
        for part in ("__init__", "inner/part", "tests/test_it"):
            file = folder / name / f"{part}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# of {name}\n" + f"def {name}_{part[-2:]}(): pass\n" * 60)
    return folder


def test_long_packages_are_cut_between_files() -> None:
    files = [f"{FILE_LINE}p/{n}.py\n" + "x = 1\n" * 20 + "\n" for n in range(9)]
    text = "".join(files)
    parts = dict(documents_of("p", text, longest=3 * len(files[0])))
    assert list(parts) == ["p-00", "p-01", "p-02"]
    assert "".join(parts.values()) == text
    assert list(dict(documents_of("p", text))) == ["p"]
    assert list(dict(documents_of("p", text, longest=len(files[0]), most=len(text) // 3))) == ["p-00", "p-03", "p-06"]


def test_held_out_packages_are_in_no_other_split(tmp_path: Path) -> None:
    stdlib = make_library(tmp_path / "stdlib", ["alpha", "email", "http", "asyncio"])
    site = make_library(tmp_path / "site", ["numpy", "click", "accelerate", "unheard_of"])
    written = write_source(tmp_path / "out", stdlib=stdlib, site=site)
    ids = {s: [d.id for d in read_documents([found.path])] for s, found in written.items()}
    assert ids == {
        "train": ["stdlib__alpha", "packages__numpy"],
        "valid": ["stdlib__asyncio", "packages__accelerate"],
        "test": ["stdlib__email", "stdlib__http", "packages__click"],
    }
    line = json.loads((tmp_path / "out" / "test.jsonl").read_text().splitlines()[0])
    assert line["text"] == package_text(stdlib / "email", stdlib)
    assert "test_it" not in line["text"]
    again = write_source(tmp_path / "out", stdlib=stdlib, site=site)
    assert again == written


def test_a_python_without_sources_gets_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Python source files for train, valid, test; use a Python whose standard"):
        write_source(tmp_path / "out", stdlib=tmp_path, site=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_command_learns_from_equal_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 5000)
    (tmp_path / "b.txt").write_text("def zzzz(): " * 5000)
    out = tmp_path / "tokenizer"
    data = ["--data", str(tmp_path / "a.txt"), "--data", str(tmp_path / "b.txt")]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["data", "tokenizer", *data, "--vocab-size", "270", "--bytes-each", "2000", "--out", str(out)])
    assert "tokens" in capsys.readouterr().out
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"zzzz", "aaaa"} & {token.strip("Ġ") for token in vocabulary}
    assert any("z" in token and len(token) > 1 for token in vocabulary)
