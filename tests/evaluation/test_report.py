"""Tables, pictures and pages of results, and ``longmem report``; most of the results are those of this project."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command

from longmem.evaluation.results import write_json
from longmem.evaluation.tables import Table, plain

ROOT = Path(__file__).parents[2]
SHIPPED = ("small-books/perplexity", "chapterbreak/chapterbreak", "needle-books/needle", "layers-small-python/layers",
           "efficiency/efficiency", "ablate-python/ablate", "smollm2/facts-1k", "bench")  # fmt: skip
MARKUP = "<img src=x onerror=alert(1)>|`![x](evil.png)"


def shipped(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return found


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One file of every kind, four that are damaged, one that is something else, and a checkpoint's config."""
    folder = tmp_path / "results"
    for name in SHIPPED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / f"{name}.json", folder / f"{name}.json")
    scores = {"backbone": {"value": 0.5, "stderr": 0.01}, "memory_64": {"value": 0.625, "stderr": None}}
    header, needle = shipped("chapterbreak/chapterbreak")["header"], shipped("needle-books/needle")
    systems = {"backbone": MARKUP, "memory_64": "a | b"}
    for name, made in {
        "harness": {"header": header | {"task": "harness"}, "systems": systems, "tasks": {"boolq": {"acc": scores}}},
        "other": {"hello": "world"},
        "model/config": {},
        "bad0/perplexity": shipped("small-books/perplexity") | {"header": {"task": "perplexity"}},
        "bad1/needle": needle | {"header": needle["header"] | {"seconds": "long"}},
    }.items():
        write_json(folder / f"{name}.json", made)
    (folder / "cut.json").write_text('{"header": {"task"')
    (folder / "deep.json").write_text("[" * 100_000)
    return folder


def test_every_kind_of_result_is_on_both_pages_and_what_is_none_is_named(
    results: Path, tmp_path: Path, command: Command
) -> None:
    found = command("report", results, "--out", tmp_path / "out", "--json").json
    text, html = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in (
        "61.258 (-9.50 [-11.23, -7.89])", "-10.71 [-12.24, -9.37]", "17 documents, 174,063 tokens", "; 1.",
        "24.3 [18.6, 29.7]", "95.5 % (191 of 200; worst depth 92 %)", "0.5000 ± 0.0100", "0.6250", "seeds 0",
        "longmem eval perplexity --model models/small/sidenet", "best head (all heads)", "4, default", "each new token",
        "greedy answer names the value", "21.29 (-6.5 %)", "GPT-3, window of 2k",  # the paper's, beside ours
    ):  # fmt: skip
        assert said in text and said in html, said
    assert "SQuAD" not in text
    # text of a result is never markup, and nothing of the page is fetched
    assert "<img src=x" not in text + html and "&lt;img src=x" in html and "a \\| b" in text
    assert not re.findall(
        r'<script|<link|@import|url\(|https?://|(?:src|href)="(?!data:)', re.sub("data:[^']*?\"", 'data:"', html)
    )
    pictures = [path for path in found["written"] if path.endswith(".svg")]
    assert len(pictures) == html.count('src="data:image/svg+xml;base64,') == 5
    for path in pictures:
        assert f"({Path(path).relative_to(tmp_path / 'out')})" in text and Path(path).read_text().startswith("<?xml")
    assert len(found["shown"]) == len(SHIPPED) + 1
    lines = [line.removeprefix(f"{results}/") for line in found["not_shown"]]
    damaged = ["bad0/perplexity.json", "bad1/needle.json", "cut.json", "deep.json", "other.json"]
    assert [line.split(":")[0] for line in lines] == damaged
    assert lines[0].endswith("a damaged result ('samples' is missing); measure it again")
    assert "a damaged result (" in lines[1] and all("not JSON (" in line for line in lines[2:4])
    assert lines[4].endswith("not a result of longmem that can be shown")


@pytest.mark.parametrize(
    ("what", "line"),
    [("cut.json", "cut.json: not JSON"), ("nowhere", "no such file or folder"), ("model", "no result files in")],
)
def test_where_nothing_can_be_shown_one_line_says_so(
    what: str, line: str, results: Path, tmp_path: Path, command: Command
) -> None:
    assert line in command("report", results / what, "--out", tmp_path / "out").error
    assert not (tmp_path / "out").exists()
    done = command("report", results / "bench.json", results / "cut.json", "--out", tmp_path / "out")
    assert done.out.split() == [str(tmp_path / "out" / f"report.{kind}") for kind in ("md", "html")]
    assert done.err.startswith(f"not shown: {results}/cut.json: not JSON (")


def test_a_table_wider_than_the_terminal_is_written_row_by_row_and_never_cut() -> None:
    table = Table(["system", "perplexity", "%"], [["backbone alone", "20.000", ""], ["LongMem", "18.000", "-10"]])
    assert plain(table, 40).splitlines() == [
        "system          perplexity    %",
        "--------------  ----------  ---",
        "backbone alone      20.000",
        "LongMem             18.000  -10",
    ]
    assert plain(table, 20) == (
        "system:\nbackbone alone\n  perplexity  20.000\nLongMem\n  perplexity  18.000\n  %           -10"
    )
