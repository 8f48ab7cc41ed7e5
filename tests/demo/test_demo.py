"""The demo end to end on a library made here, and its parts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from longmem import LongMem
from longmem.cli.demo import passage_lines
from longmem.data.python_source import file_at, packages
from longmem.demo.corpus import write_corpus
from longmem.demo.page import page
from longmem.demo.reading import Chunk, Passage, TokenReading, most_helped_passage
from longmem.demo.run import DemoResult, DemoStopped, recipe_file, run_demo
from longmem.errors import DataError
from longmem.training.loop import TrainResult
from longmem.training.recipe import Recipe

EVIL = '</script><script>alert("x")</script><!-- & \u2028'


def test_a_package_is_one_document_in_which_every_file_is_named(library: Path) -> None:
    texts = dict(packages(library))
    assert sorted(texts) == ["alpha", "beta", "email", "gamma", "http"]
    assert re.findall(r"(?m)^# file: (.*)$", texts["alpha"]) == ["alpha/__init__.py", "alpha/inner/part.py"]
    assert file_at(texts["alpha"], len(texts["alpha"]) - 5) == "alpha/inner/part.py"
    assert file_at(texts["alpha"], 0) == "alpha/__init__.py"


def test_the_line_that_names_a_file_is_not_taken_from_the_middle_of_a_line() -> None:
    text = "# file: a.py\nprint('# file: not one')\nend"
    assert file_at(text, len(text) - 1) == "a.py"


def test_held_out_packages_are_never_in_the_training_text(library: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, library)
    assert {file.stem for file in corpus.train.iterdir()} == {"alpha", "beta", "gamma"}
    assert {file.stem for file in corpus.held_out.iterdir()} == {"email", "http"}
    assert write_corpus(tmp_path, library).digest == corpus.digest


def test_a_python_without_source_files_gets_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0 packages with source files.* run the demo with a Python"):
        write_corpus(tmp_path / "out", tmp_path)


def test_the_demo_makes_models_table_page_and_picture(demo: tuple[Path, list[str], DemoResult]) -> None:
    out, said, result = demo
    assert any("training, at most" in line for line in said)
    assert list(result.perplexity.protocols) == ["segments", "sliding"]
    assert set(result.perplexity.systems) >= {"backbone", "memory_off", "memory_1024"}
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "perplexity" / "perplexity.json").read_text())["protocols"]
    assert isinstance(LongMem.from_pretrained(out / "sidenet" / "final"), LongMem)


def test_every_token_of_the_passage_names_what_it_found(demo: tuple[Path, list[str], DemoResult]) -> None:
    out, _, result = demo
    passage = result.passage
    text = (out / "text" / "held-out" / f"{passage.document}.txt").read_text()
    assert "".join(token.text for token in passage.tokens) in text
    assert passage.document in ("email", "http")
    for token in passage.tokens:
        assert token.found
        assert sum(part for _, part in token.found) <= token.share + 1e-5 <= 1
    for chunk in passage.chunks:
        assert chunk.before + chunk.text + chunk.after in text
        assert chunk.document == passage.document
        assert chunk.file.startswith(passage.document)
        assert 0 < chunk.tokens_back <= passage.start_token


def test_the_passage_is_printed_with_its_examples(demo: tuple[Path, list[str], DemoResult]) -> None:
    shown = "\n".join(passage_lines(demo[2].passage))
    assert "share given to memory" in shown
    assert "[[" in shown


def test_a_second_run_trains_nothing(demo: tuple[Path, list[str], DemoResult], library: Path) -> None:
    out, _, first = demo
    weights = out / "sidenet" / "final" / "sidenet.safetensors"
    before, said = weights.stat().st_mtime_ns, list[str]()
    again = run_demo(out, minutes=(0.05, 0.05), library=library, max_tokens=1500, say=said.append, quiet=True)
    assert weights.stat().st_mtime_ns == before
    assert sum("made before" in line for line in said) == 2
    assert again.passage == first.passage


def test_an_interrupted_training_goes_on_where_it_stopped(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[bool] = []

    def stopped(recipe: Recipe, *, resume: bool, **_: object) -> TrainResult:
        resumed.append(resume)
        return TrainResult(tmp_path, None, 1, 1, 1.0, [], {})

    monkeypatch.setattr("longmem.demo.run.train", stopped)
    for _ in range(2):
        with pytest.raises(DemoStopped, match="the same command goes on"):
            run_demo(tmp_path, library=library, quiet=True)
    with pytest.raises(DemoStopped):
        run_demo(tmp_path, minutes=(9, 9), library=library, quiet=True)
    assert resumed == [False, True, False]  # another recipe begins anew


def test_a_document_that_is_too_short_is_refused_in_one_line(demo: tuple[Path, list[str], DemoResult]) -> None:
    from longmem.data.tokenizer import load_tokenizer

    final = demo[0] / "sidenet" / "final"
    model = LongMem.from_pretrained(final)
    tokenizer = load_tokenizer(demo[0] / "backbone" / "final")
    with pytest.raises(DataError, match=r"short: .* tokens are too few to show a passage"):
        most_helped_passage(model, tokenizer, "short", "a b", window=128, memory_tokens=1024, max_tokens=2000)


def test_the_page_stands_alone_and_holds_texts_as_text() -> None:
    chunk = Chunk(EVIL, EVIL, 0, 8, EVIL, EVIL, EVIL)
    token = TokenReading(EVIL, 0.5, 0.2, 0.1, [(0, 0.4)])
    html = page(Passage(EVIL, EVIL, 8, 8, 1, 0.1, 0.1, [token, token], [chunk]), 2, [["", "a"], ["b", EVIL]])
    reader = _Reader()
    reader.feed(html)
    assert reader.scripts == 2
    assert not reader.outside
    assert json.loads(reader.data)["tokens"][0]["text"] == EVIL
    assert "innerHTML" not in html


def test_the_demo_recipes_are_where_the_command_looks_for_them() -> None:
    assert recipe_file("demo-backbone.toml").exists()
    assert recipe_file("demo-sidenet.toml").exists()


class _Reader(HTMLParser):
    """Counts scripts, keeps the data, notes anything that would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.data, self.outside, self._in_data = 0, "", list[str](), False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.scripts += tag == "script"
        self._in_data = tag == "script" and named.get("id") == "data"
        self.outside += [f"{tag} {name}" for name in ("src", "href") if name in named]

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data
