"""Python source as documents."""

import json
import sys
from pathlib import Path

import pytest
from recipes.data.python import documents_of, write_source
from recipes.data.tokenizer import main

from longmem.data.text import FILE_LINE, package_text, read_documents


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
    ids = {split: [d.id for d in read_documents([tmp_path / "out" / f"{split}.jsonl"])] for split in written}
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


def test_the_tokenizer_is_learned_from_equal_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 5000)
    (tmp_path / "b.txt").write_text("def zzzz(): " * 5000)
    out, texts = tmp_path / "tokenizer", [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    monkeypatch.setattr(sys, "argv", ["x", *texts, "--vocab-size", "270", "--bytes-each", "2000", "--out", str(out)])
    main()
    assert "270 tokens" in capsys.readouterr().out
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"zzzz", "aaaa"} & {token.strip("Ġ") for token in vocabulary}
    assert any("z" in token and len(token) > 1 for token in vocabulary)
