"""Tables, pictures and pages of results, and ``longmem report``; most of the results are those of this project."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command

from longmem import DataError
from longmem.evaluation.report import build_report
from longmem.evaluation.results import write_json
from longmem.evaluation.tables import Table, plain

ROOT = Path(__file__).parents[2]
SHIPPED = ("small-books/perplexity", "chapterbreak/chapterbreak", "needle-books/needle", "layers-small-python/layers",
           "efficiency/efficiency", "ablate-python/ablate", "smollm2/facts-1k", "bench")  # fmt: skip


def shipped(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return found


def harness_result(label: str = "backbone alone") -> dict[str, Any]:
    scores = {"backbone": {"value": 0.5, "stderr": 0.01}, "memory_64": {"value": 0.625, "stderr": None}}
    systems = {"backbone": label, "memory_64": "a | b"}
    header = shipped("chapterbreak/chapterbreak")["header"] | {"task": "harness"}
    return {"header": header, "systems": systems, "tasks": {"boolq": {"acc": scores}}}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One file of every kind, four that are damaged, one that is something else, and a checkpoint's config."""
    folder = tmp_path / "results"
    for name in SHIPPED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / f"{name}.json", folder / f"{name}.json")
    made = {"harness": harness_result(), "other": {"hello": "world"}, "model/config": {}}
    made["bad0/perplexity"] = shipped("small-books/perplexity") | {"header": {"task": "perplexity"}}
    needle = shipped("needle-books/needle")
    made["bad1/needle"] = needle | {"header": needle["header"] | {"seconds": "long"}}
    for name, result in made.items():
        write_json(folder / f"{name}.json", result)
    (folder / "cut.json").write_text('{"header": {"task"')
    (folder / "deep.json").write_text("[" * 100_000)
    return folder


def test_every_kind_of_result_is_on_both_pages(results: Path, tmp_path: Path) -> None:
    report = build_report([results])
    report.write(tmp_path / "out")
    text, html = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in (
        "61.258 (-9.50 [-11.23, -7.89])", "-10.71 [-12.24, -9.37]", "17 documents, 174,063 tokens", "; 1.",
        "24.3 [18.6, 29.7]", "95.5 % (191 of 200; worst depth 92 %)", "0.5000 ± 0.0100", "0.6250", "seeds 0",
        "longmem eval perplexity --model models/small/sidenet", "best head (all heads)", "4, default", "each new token",
        "greedy answer names the value", "21.29 (-6.5 %)", "GPT-3, window of 2k",  # the paper's, beside ours
    ):  # fmt: skip
        assert said in text and said in html, said
    assert "SQuAD" not in text
    assert len(report.pictures) == 5
    for path in report.pictures:
        assert f"({path})" in text
        assert (tmp_path / "out" / path).read_text().startswith("<?xml")
    assert not re.findall(r"<script|<link|@import|url\(|https?://", re.sub(r'src="data[^"]*"', "", html))
    assert html.count('src="data:image/svg+xml;base64,') == 5


def test_what_is_no_result_is_named_in_one_line_and_the_rest_is_shown(
    results: Path, tmp_path: Path, command: Command
) -> None:
    done = command("report", results, "--out", tmp_path / "out")
    assert done.status == 0
    assert done.out.split() == [str(tmp_path / "out" / f"report.{kind}") for kind in ("md", "html")]
    lines = [line.removeprefix(f"not shown: {results}/") for line in done.err.splitlines()]
    damaged = ["bad0/perplexity.json", "bad1/needle.json", "cut.json", "deep.json", "other.json"]
    assert [line.split(":")[0] for line in lines] == damaged
    assert lines[0].endswith("a damaged result ('samples' is missing); measure it again")
    assert "a damaged result (" in lines[1] and all("not JSON (" in line for line in lines[2:4])
    assert lines[4].endswith("not a result of longmem that can be shown")
    for wrong, said in ((results / "cut.json", "cut.json: not JSON"), (results / "nowhere", "no such file or folder")):
        assert said in command("report", wrong, "--out", tmp_path / "other").error
    assert not (tmp_path / "other").exists()
    found = command("report", results, "--out", tmp_path / "out", "--json").json
    assert {*done.out.split()} < {*found["written"]}, "pictures too"
    assert (len(found["not_shown"]), len(found["shown"])) == (len(lines), len(SHIPPED) + 1)
    with pytest.raises(DataError, match="no result files in"):
        build_report([results / "model"])


def test_text_of_a_result_is_never_markup(tmp_path: Path) -> None:
    write_json(tmp_path / "harness.json", harness_result("<img src=x onerror=alert(1)>|`![x](http://x)"))
    report = build_report([tmp_path])
    assert "<img src=x" not in report.html() and "&lt;img src=x" in report.html()
    assert not re.findall(r'(src|href)="(?!data:)', report.html())
    assert "<img src=x" not in report.text and "a \\| b" in report.text


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
