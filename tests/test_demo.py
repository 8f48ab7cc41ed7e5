"""``longmem demo``: a pair remembers texts that are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longmem import MemoryStore
from longmem.cli.main import main
from longmem.demo import MEMORY_SIZES, NAMESPACE, NEW, PROMPT, find_texts, run_demo
from longmem.errors import DataError


@pytest.fixture
def side(demo_folder: Path) -> Path:
    return demo_folder / "models" / "small" / "sidenet"


def test_beginnings_are_kept_measured_and_continued(
    demo_folder: Path, side: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [str(demo_folder / "runs" / "demo" / "text" / f"{name}.txt") for name in ("http", "email")]
    said: list[str] = []
    made = run_demo(tmp_path, texts, model=side, max_tokens=1500, say=said.append)
    assert [line.split(":")[0] for line in said[:2]] == ["http.txt", "email.txt"]
    with MemoryStore.open(made.store, mode="read", create=False) as store:
        kept = store.text(NAMESPACE, "http.txt")
        assert store.stats().tokens == made.tokens == 3000
    whole = Path(texts[0]).read_text()
    assert whole == kept + whole[1500:] == (tmp_path / "text" / "http.txt").read_text()
    # the continuation is of what was not remembered
    assert whole[1500:].startswith(made.prompt + made.real)
    assert (len(made.prompt), len(made.read)) == (PROMPT, NEW)
    assert any(token.found and abs(token.gain) > 1e-6 for token in made.read)
    assert set(made.perplexity["systems"]) == {"backbone", "memory_off", *(f"memory_{size}" for size in MEMORY_SIZES)}
    assert made.page.read_text().startswith("<!doctype html>")

    # a second run encodes nothing again, and prints
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["demo", texts[0], "--model", str(side), "--out", str(tmp_path / "again"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert Path(found["page"]).exists() and len(found["read"]) == NEW
    assert found["perplexity"]["header"]["task"] == "perplexity"


def test_texts_are_found_by_name_and_told_apart(tmp_path: Path) -> None:
    (text,) = find_texts(["json"])
    assert text.id == "json" and text.text.startswith("# file: json/__init__.py")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    found = find_texts([str(tmp_path / name / "x.txt") for name in "ab"])
    assert [(each.id, each.text) for each in found] == [("x.txt", "a"), ("x.txt (2)", "b")]


def test_what_cannot_be_shown_is_one_line_and_nothing_is_written(
    side: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(DataError, match=rf"short.txt: 11 tokens are too few .* it needs {2 * PROMPT + NEW}"):
        run_demo(tmp_path / "out", [str(tmp_path / "short.txt")], model=side)
    with pytest.raises(DataError, match="backbone is no LongMem; name the folder of a SideNet with --model"):
        run_demo(tmp_path / "out", ["json"], model=side.parent / "backbone")
    with pytest.raises(DataError, match="no_such_thing: neither a file nor a package of this Python"):
        run_demo(tmp_path / "out", ["no_such_thing"], model=side)
    monkeypatch.setattr("longmem.demo.__file__", str(tmp_path / "site-packages" / "longmem" / "demo.py"))
    with pytest.raises(DataError, match="no model here: the trained pair is in models/small of the source tree"):
        run_demo(tmp_path / "out", ["json"])
    assert not (tmp_path / "out").exists()
