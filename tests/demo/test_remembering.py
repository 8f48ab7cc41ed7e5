"""``longmem demo``: a pair remembers texts that are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore
from longmem.cli.main import main
from longmem.demo.remembering import NAMESPACE, NEW, PROMPT, find_texts, remember
from longmem.demo.run import DemoResult
from longmem.errors import DataError

Demo = tuple[Path, list[str], DemoResult]


@pytest.fixture
def pair(demo: Demo) -> Path:
    return demo[0] / "sidenet" / "final"


@pytest.fixture
def texts(demo: Demo) -> list[str]:
    return [str(demo[0] / "text" / "held-out" / f"{name}.txt") for name in ("http", "email")]


def test_beginnings_are_kept_measured_and_continued(pair: Path, texts: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    made = remember(tmp_path, texts, model=pair, max_tokens=1500, say=said.append)
    assert [line.split(":")[0] for line in said[:2]] == ["http.txt", "email.txt"]
    with MemoryStore.open(made.store, mode="read") as store:
        kept = store.text(NAMESPACE, "http.txt")
        assert [each.name for each in store.documents(NAMESPACE)] == ["http.txt", "email.txt"]
        assert store.stats().tokens == made.tokens
    whole = Path(texts[0]).read_text()
    assert whole.startswith(kept)
    # the continuation is of what was not remembered
    after = whole[len(kept) :]
    assert after.startswith(made.continuation.prompt[:20])
    assert made.continuation.real[:20] in after[len(made.continuation.prompt) - 5 :]
    assert made.hits
    assert all(hit.passage.text in kept for hit in made.hits)
    assert set(made.perplexity.systems) == {"backbone", "memory_off", "memory_1024", "memory_8192"}
    assert made.page.read_text().startswith("<!doctype html>")
    assert made.picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "text" / "http.txt").read_text() == whole


def test_a_second_run_encodes_nothing_again(pair: Path, texts: list[str], tmp_path: Path) -> None:
    first = remember(tmp_path, texts[:1], model=pair, max_tokens=1500, say=lambda line: None)
    files = {file: file.stat().st_mtime_ns for file in (first.store / "segments").iterdir()}
    again = remember(tmp_path, texts[:1], model=pair, max_tokens=1500, say=lambda line: None)
    assert {file: file.stat().st_mtime_ns for file in (again.store / "segments").iterdir()} == files
    assert again.continuation == first.continuation


def test_packages_are_found_by_name() -> None:
    ((name, text),) = find_texts(["json"])
    assert name == "json"
    assert text.startswith("# file: json/__init__.py")
    with pytest.raises(DataError, match="no_such_thing: neither a file nor a package of this Python"):
        find_texts(["no_such_thing"])


def test_a_text_that_is_too_short_is_refused(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(DataError, match=r"short.txt: \d+ tokens are too few to remember and to go on"):
        remember(tmp_path / "out", [str(tmp_path / "short.txt")], model=pair, say=lambda line: None)


@pytest.fixture
def random_pair(tmp_path: Path, byte_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128}
    AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=260, **shape)).save_pretrained(tmp_path / "backbone")
    byte_tokenizer.save_pretrained(tmp_path / "backbone")
    side = LongMem.from_backbone(tmp_path / "backbone", chunk_size=4, num_retrieved=8, memory_size=64)
    side.save_pretrained(tmp_path / "side")
    return tmp_path / "side"


def test_a_text_without_a_passage_to_show_is_refused_before_anything_is_written(
    random_pair: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.txt").write_text("so it went. " * 100)  # bytes are tokens: enough to go on, too few to show
    with pytest.raises(DataError, match=rf"some.txt: 1200 tokens are too few .* it needs {1153 + PROMPT + NEW}"):
        remember(tmp_path / "out", [str(tmp_path / "some.txt")], model=random_pair, say=lambda line: None)
    with pytest.raises(DataError, match="backbone is no LongMem; name the folder of a SideNet with --model"):
        remember(tmp_path / "out", ["json"], model=tmp_path / "backbone", say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_texts_of_one_name_are_two_texts(random_pair: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"{name} came and {name} went. " * 80)
    paths = [str(tmp_path / name / "x.txt") for name in "ab"]
    made = remember(tmp_path / "out", paths, model=random_pair, max_tokens=1200, say=lambda line: None)
    with MemoryStore.open(made.store, mode="read") as store:
        assert [store.text(NAMESPACE, name)[:6] for name in ("x.txt", "x.txt (2)")] == ["a came", "b came"]
    assert [document.id for document in made.perplexity.documents] == ["x.txt", "x.txt (2)"]
    kept = {file.name: file.read_text()[:6] for file in (tmp_path / "out" / "text").iterdir()}
    assert kept == {"x.txt": "a came", "x (2).txt": "b came"}


def test_the_command_prints_numbers_passage_and_continuation(
    pair: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["demo", texts[0], "--model", str(pair), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for expected in ("share given to memory", "goes on behind what was remembered", "with memory (the text itself"):
        assert expected in out
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["demo", texts[0], "--model", str(pair), "--out", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert Path(found["page"]).exists()
    assert found["continuation"]["loss_with"] > 0
    assert found["tokens"] > PROMPT + NEW


@pytest.mark.parametrize("arguments", [["--train", "json"], ["--minutes", "1", "1"], ["--train", "--model", "x"]])
def test_options_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["demo", *arguments])
