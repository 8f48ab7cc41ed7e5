"""Tables, pictures and pages of results, and ``longmem report``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from longmem import ConfigError, DataError
from longmem.cli.main import main
from longmem.evaluation import report as paper
from longmem.evaluation.pages import Picture, Table, plain
from longmem.evaluation.report import build_report, write_report
from longmem.evaluation.results import write_json
from longmem.evaluation.systems import chosen, largest
from longmem.evaluation.tables import caveat, tables_of

ROOT = Path(__file__).parents[2]
SYSTEMS = {"backbone": "backbone alone", "memory_off": "SideNet, memory off", "memory_64": "LongMem, 64 tokens"}


def interval(low: float, high: float) -> dict[str, Any]:
    return {"low": low, "high": high, "level": 0.95, "units": "documents", "count": 3, "groups": 2}


def header(task: str, **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "command": f"longmem eval {task} --model runs/x",
        "config": {"model": "runs/x", "window": 256, "data": ["texts/books.tar.xz"]},
        "samples": {"documents": 3, "projects": 2, "tokens": 4321},
        "seeds": [3],
        "seconds": 12.5,
        "created": "2026-01-01T00:00:00",
        "versions": {},
        "machine": {"torch_threads": 1},
    } | more


def perplexity_result() -> dict[str, Any]:
    values = {"backbone": 20.0, "memory_off": 19.5, "memory_64": 18.0}
    pairs = [("memory_off", "backbone", -2.5), ("memory_64", "backbone", -10.0), ("memory_64", "memory_off", -7.69)]

    def part(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "documents": 3,
            "systems": [
                {"system": s, "perplexity": v, "word_perplexity": 2e6, "bits_per_byte": 1.25} for s, v in values.items()
            ],
            "differences": [
                {"system": s, "against": a, "percent": p, "documents": interval(p - 1, p + 1), "blocks": None}
                for s, a, p in pairs
            ],
            "by_position": [
                {"low": n, "high": 2 * n, "tokens": 5000, "perplexity": values, "percent": dict.fromkeys(values, -1.0)}
                for n in (128, 256, 512)
            ],
        }  # fmt: skip

    protocols = {
        name: {
            "protocol": name, "window": 256, "stride": stride, "all": part("all"),
            "groups": [part("one"), part("two")], "by_length": [part("5k-10k")],
        }
        for name, stride in (("segments", 256), ("sliding", 128))
    }  # fmt: skip
    return {"header": header("perplexity"), "systems": SYSTEMS, "protocols": protocols, "documents": []}


def task_result(task: str, groups: tuple[str, ...]) -> dict[str, Any]:
    metric = {"name": "exact", "label": "accuracy", "unit": "%", "better": "higher", "chance": 100 / 6}
    scores = [
        {"system": s, "metric": "exact", "value": 40.0 + i, "interval": interval(30, 50)} for i, s in enumerate(SYSTEMS)
    ]
    gap = {"system": "memory_64", "against": "backbone", "metric": "exact", "value": 2.0, "interval": interval(-1, 5)}
    return {
        "header": header(task, samples={"examples": 12}),
        "systems": SYSTEMS,
        "metrics": [metric],
        "groups": [{"group": name, "examples": 6, "scores": scores, "differences": [gap]} for name in groups],
        "examples": [
            {"group": name, "values": {s: {"exact": 100.0 * (i % 2)} for s in SYSTEMS}} for i, name in enumerate(groups)
        ],
    }


def harness_result() -> dict[str, Any]:
    scores = {"backbone": {"value": 0.5, "stderr": 0.01}, "memory_64": {"value": 0.625, "stderr": None}}
    return {"header": header("harness"), "systems": SYSTEMS, "tasks": {"boolq": {"acc": scores}}}


BENCH = {
    "command": "python -m benchmarks.bench", "seed": 0,
    "surroundings": {"machine": "a machine", "threads": 1, "date": "2026-01-01"},
    "step": {"seconds": {"median": 0.5, "min": 0.25, "max": 0.75}, "tokens": 4096},
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One file of every kind, two that are damaged, one that is something else, and a checkpoint's config."""
    folder = tmp_path / "results"
    needles = tuple(f"passkey, {n:,} tokens, depth {d} %" for n in (4096, 65536) for d in (0, 50))
    damaged = perplexity_result() | {"header": {"task": "perplexity"}}
    for name, result in {
        "books/perplexity": perplexity_result(),
        "chapters/chapterbreak": task_result("chapterbreak", ("all", "ao3, 4k", "ao3, 8k")),
        "needle/needle": task_result("needle", needles),
        "harness/harness": harness_result(),
        "bench": BENCH,
        "broken/perplexity": damaged,
        "other": {"hello": "world"},
        "model/config": {"model_type": "longmem"},
    }.items():
        write_json(folder / f"{name}.json", result)
    (folder / "cut.json").write_text('{"header": {"task"')
    return folder


def test_every_kind_of_result_is_on_both_pages(results: Path, tmp_path: Path) -> None:
    report = build_report([results], base=tmp_path)
    write_report(report, tmp_path / "out")
    text, html = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in (
        "18.000 (-10.00 [-11.00, -9.00])", "-7.69 [-8.69, -6.69]", "3 documents of 2 projects", "2e+06; 1.2500",
        "41.0 [30.0, 50.0]", "50.0 % (1 of 2; worst depth 0 %)", "0.6250", "0.5000 ± 0.0100", "0.5 (0.25 to 0.75)",
        "seeds 3", "12 s on", "longmem eval perplexity --model runs/x",
    ):  # fmt: skip
        assert said in text and said in html, said
    names = [block.name for block in report.blocks if isinstance(block, Picture)]
    assert len(names) == len(set(names)) == 4
    for name in names:
        assert f"(pictures/{name}.svg)" in text
        assert (tmp_path / "out" / "pictures" / f"{name}.svg").read_text().startswith("<?xml")
    assert not re.findall(r"<script|<link|@import|url\(|https?://", re.sub(r'src="data[^"]*"', "", html))
    assert html.count('src="data:image/svg+xml;base64,') == 4


def test_what_is_no_result_is_named_in_one_line_and_the_rest_is_shown(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["report", str(results), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert not done.value.code
    assert captured.out.split() == [str(tmp_path / "out" / f"report.{kind}") for kind in ("md", "html")]
    lines = [line.removeprefix(f"not shown: {results}/") for line in captured.err.splitlines()]
    assert [line.split(":")[0] for line in lines] == ["broken/perplexity.json", "cut.json", "other.json"]
    assert "not JSON" in lines[1] and "without header" in lines[2]
    assert lines[0].endswith("a damaged result ('samples' is missing); measure it again")
    for wrong, said in ((results / "cut.json", "cut.json: not JSON"), (results / "nowhere", "no such file or folder")):
        with pytest.raises(SystemExit) as done:
            main(["report", str(wrong), "--out", str(tmp_path / "other")])
        assert done.value.code == 1 and said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match="no result files in"):
        build_report([results / "model"])


def _damaged() -> list[dict[str, Any]]:
    undrawable = perplexity_result()
    for part in undrawable["protocols"]["sliding"]["all"]["by_position"]:
        del part["percent"]
    wrong = ({"samples": ["documents"]}, {"samples": {"documents": "many"}}, {"seconds": "long"})
    found = [perplexity_result() | {"header": header("perplexity", **fields)} for fields in wrong]
    return [*found, perplexity_result() | {"systems": SYSTEMS | {"memory_off": ["no text"]}}, undrawable]


def test_damaged_results_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    write_json(tmp_path / "good" / "perplexity.json", perplexity_result())
    for number, damaged in enumerate(_damaged()):
        write_json(tmp_path / f"bad{number}" / "perplexity.json", damaged)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    report = build_report([tmp_path])
    assert [Path(file.path).parent.name for file in report.files] == ["good"]
    assert [line.split(": ", 1)[1][:9] for line in report.problems] == ["a damaged"] * 5 + ["not JSON "]


def test_text_of_a_result_is_never_markup(tmp_path: Path) -> None:
    result = harness_result() | {
        "systems": {"backbone": "<img src=x onerror=alert(1)>|`![x](http://x)", "memory_64": "a | b"}
    }
    write_json(tmp_path / "harness.json", result)
    report = build_report([tmp_path])
    assert "<img src=x" not in report.html() and "&lt;img src=x" in report.html()
    assert not re.findall(r'(src|href)="(?!data:)', report.html())
    assert "<img src=x" not in report.markdown("p") and "a \\| b" in report.markdown("p")


def test_a_table_wider_than_the_terminal_is_written_row_by_row_and_never_cut() -> None:
    table = Table(["system", "perplexity", "%"], [["backbone alone", "20.000", ""], ["LongMem", "18.000", "-10"]])
    assert plain(table, 40).splitlines() == [
        "system          perplexity    %",
        "--------------  ----------  ---",
        "backbone alone      20.000",
        "LongMem             18.000  -10",
    ]
    assert plain(table, 20).splitlines() == [
        "system:",
        "backbone alone",
        "  perplexity  20.000",
        "LongMem",
        "  perplexity  18.000",
        "  %           -10",
    ]


def test_what_intervals_say_stands_beside_them() -> None:
    assert "no two of one project" in caveat(3, 3)
    assert "say nothing about others" in caveat(3, 1)
    assert "2 projects say little" in caveat(3, 2)
    assert caveat(300, 20) == "Intervals draw projects, then their documents."
    (main_table, *_) = tables_of(perplexity_result())
    assert "3 documents of 2 projects" in main_table.caption and caveat(3, 2) in main_table.caption


def test_systems_are_chosen_by_the_beginnings_of_their_names() -> None:
    names = ["backbone", "memory_off", "memory_8", "memory_64", "memtrm_8"]
    assert largest(names) == ["backbone", "memory_off", "memory_64", "memtrm_8"]
    assert chosen(names, []) == names
    assert chosen(names, ["memory_6", "back"]) == ["backbone", "memory_64"]
    with pytest.raises(ConfigError, match=r"--systems \(memory_1\) begins no system's name; there are backbone, "):
        chosen(names, ["backbone", "memory_1"])


def test_the_papers_tables_stand_beside_results_of_the_same_kind(results: Path) -> None:
    text = build_report([results]).markdown("pictures")
    assert "| LongMem | 21.29 (-6.5 %) | 23.01 (-5.7 %) |" in text and "GPT-3, window of 2k" in text
    assert "SQuAD" not in text
    for table in (paper.BOOKS, paper.ARXIV):
        base, *others = [[float(cell.split()[0]) for cell in row[1:]] for row in table.rows]
        for row, values in zip(table.rows[1:], others, strict=True):
            for cell, value, start in zip(row[1:], values, base, strict=True):
                assert f"{100 * (value / start - 1):+.1f} %" in cell
    for row in paper.TASKS["icl"].rows:
        *sets, average = [float(cell.split()[0]) for cell in row[1:]]
        assert sum(sets) / 5 == pytest.approx(average, abs=0.06)


@pytest.mark.shared
def test_the_papers_numbers_are_those_written_down_for_the_project(shared_dir: Path) -> None:
    text = (shared_dir / "PAPER.md").read_text(encoding="utf-8")
    for table in (paper.BOOKS, paper.ARXIV, *paper.TASKS.values()):
        for cell in (cell for row in table.rows for cell in row[1:] if cell != "-"):
            assert cell.split()[0] in text or f"{float(cell.split()[0]):g}" in text
