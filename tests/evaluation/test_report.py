"""``longmem report``: every kind of result on a page of Markdown and of HTML, and what is no result named."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from longmem import DataError
from longmem.cli.main import main
from longmem.evaluation import paper_numbers as paper
from longmem.evaluation.bootstrap import Interval
from longmem.evaluation.report.blocks import Heading, Picture, Table, Text, markdown, page
from longmem.evaluation.report.build import build_report, write_report
from longmem.evaluation.results import RunHeader, write_json
from longmem.evaluation.runner import ExampleScores, GroupScores, MetricDifference, MetricScore, TaskResult
from longmem.evaluation.systems import BACKBONE, LONGMEM
from longmem.evaluation.task import Metric
from longmem.evaluation.themes import DARK, LIGHT, THEMES, picture

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from results_page import lacks_pictures, results_report

ROOT = Path(__file__).parents[2]
SYSTEMS = {"backbone": "backbone alone", "memory_off": "SideNet, memory off", "memory_64": "LongMem, 64 tokens"}


def interval(low: float, high: float) -> Interval:
    return Interval(low, high, 0.95, "documents", 3, 50, 0)


def header(task: str, **more: Any) -> RunHeader:
    given = {
        "command": f"longmem eval {task} --model runs/x",
        "config": {"model": "runs/x", "window": 256, "data": ["texts/books.tar.xz"]},
        "models": {"backbone": {"parameters": 8_100_000}, "memory_off": {"trained_parameters": 2_000_000}},
        "samples": {"documents": 3, "tokens": 4321},
        "seeds": [3],
        "seconds": 12.5,
    }
    return RunHeader(task=task, **{**given, **more})


def perplexity_result() -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        values = {"backbone": 20.0, "memory_off": 19.5, "memory_64": 18.0}
        pairs = [("memory_off", "backbone", -2.5), ("memory_64", "backbone", -10.0), ("memory_64", "memory_off", -7.69)]
        bins = [
            {
                "low": low, "high": 2 * low, "documents": 3, "tokens": 5000, "perplexity": values,
                "percent": {"backbone": 0.0, "memory_off": -2.5, "memory_64": -low / 100},
            }
            for low in (128, 256, 512)
        ]  # fmt: skip
        return {
            "name": name, "documents": 3, "tokens": 4321,
            "systems": [{"system": s, "perplexity": v} for s, v in values.items()],
            "differences": [
                {"system": s, "against": a, "percent": p, "documents": asdict(interval(p - 1, p + 1)), "blocks": None}
                for s, a, p in pairs
            ],
            "by_position": bins,
        }  # fmt: skip

    def protocol(name: str, stride: int) -> dict[str, Any]:
        return {
            "protocol": name, "window": 256, "stride": stride, "all": part("all"),
            "groups": [part("one"), part("two")], "by_length": [part("5k-10k"), part("10k-100k")],
        }  # fmt: skip

    protocols = {"segments": protocol("segments", 256), "sliding": protocol("sliding", 128)}
    return {"header": asdict(header("perplexity")), "systems": SYSTEMS, "protocols": protocols, "documents": []}


def task_result(task: str, groups: tuple[str, ...]) -> TaskResult:
    metric = Metric("accuracy", "accuracy by likelihood", "%", chance=100 / 6)
    return TaskResult(
        header=header(task, samples={"examples": 12}),
        systems=SYSTEMS,
        skipped={"memtrm_64": "has another tokenizer"},
        metrics=[metric],
        groups=[
            GroupScores(
                name, 6, 6,
                [MetricScore(system, "accuracy", 40.0 + i, interval(30.0, 50.0)) for i, system in enumerate(SYSTEMS)],
                [MetricDifference("memory_64", "backbone", "accuracy", 2.0, interval(-1.0, 5.0))],
            )
            for name in groups
        ],
        examples=[ExampleScores("1", groups[0], "1", {"backbone": {"accuracy": 0.0}})],
        extra={},
    )  # fmt: skip


def ablation_result() -> dict[str, Any]:
    def score(percent: float) -> dict[str, Any]:
        return {
            "perplexity": 18 + percent,
            "percent": percent,
            "documents": asdict(interval(percent - 0.1, percent + 0.1)),
            "blocks": None,
        }

    values = [
        {"value": v, "default": v == "4", "scores": {"sliding": score(p)}, "differs": ""}
        for v, p in (("2", -0.2), ("4", 0.0))
    ]
    return {
        "header": asdict(header("ablate")), "default": {"chunk_size": 4, "gate_share": [0.5]},
        "protocols": {"sliding": {"window": 256, "stride": 128}},
        "without": {"backbone": {"sliding": score(11.0)}},
        "axes": [{"name": "chunk_size", "label": "chunk size (tokens)", "trained": False, "values": values}],
        "left_out": {"gate_share": "every token chooses its own share"},
    }  # fmt: skip


def efficiency_result() -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "low": value * 0.9, "high": value * 1.1, "rounds": 3}

    points = [
        {
            "system": system, "context": context, "first_token": spread(context / 4000), "read": spread(4000.0),
            "per_token": spread(0.02), "plain": spread(0.02), "moving": None, "generated": spread(50.0),
            "peak": {"total": 2 << 30, "beyond": context << 14}, "note": None,
        }
        for system in ("longmem", "full") for context in (1024, 4096)
    ]  # fmt: skip
    ratio = {"system": "full", "context": 4096, "first_token": spread(1.5), "per_token": spread(2.5), "peak": 3.25}
    return {
        "header": asdict(header("efficiency")), "systems": {"longmem": "LongMem", "full": "full attention"},
        "window": 1024, "move": 512, "memory_size": 65536, "attention": "sdpa", "weights_bytes": 1,
        "points": points, "ratios": [ratio],
        "left_out": [{"system": "full", "context": 65536, "reason": "the backbone's positions end at 8,192"}],
    }  # fmt: skip


def harness_result() -> dict[str, Any]:
    scores = {"backbone": {"value": 0.5, "stderr": 0.01}, "memory_64": {"value": 0.625, "stderr": None}}
    return {
        "header": asdict(header("harness")),
        "systems": SYSTEMS,
        "tasks": {"boolq": {"acc": scores}},
        "versions": {},
    }


BENCH = {
    "command": "python -m benchmarks.bench", "seed": 0,
    "surroundings": {"machine": "a machine", "threads": 1, "date": "2026-01-01"},
    "step": {"seconds": {"median": 0.5, "min": 0.25, "max": 0.75}, "tokens": 4096},
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One file of every kind, two that are damaged, one that is something else, and a checkpoint's config."""
    folder = tmp_path / "results"
    needle = tuple(f"pass key, {n:,} tokens, depth {d} %" for n in (4096, 65536) for d in (0, 50))
    for name, result in (
        ("books/perplexity", perplexity_result()),
        ("chapters/chapterbreak", task_result("chapterbreak", ("all", "ao3, 4k", "ao3, 8k"))),
        ("needle/needle", task_result("needle", ("all", *needle))),
        ("ablate-books/ablate", ablation_result()),
        ("speed/efficiency", efficiency_result()),
        ("harness/harness", harness_result()),
        ("bench", BENCH),
        (
            "broken/perplexity",
            {key: value for key, value in perplexity_result().items() if key != "header"}
            | {"header": {"task": "perplexity"}},
        ),
        ("other", {"hello": "world"}),
        ("model/config", {"model_type": "longmem"}),
    ):
        write_json(folder / f"{name}.json", result)
    (folder / "cut.json").write_text('{"header": {"task"')
    return folder


def test_every_kind_of_result_is_on_both_pages(results: Path, tmp_path: Path) -> None:
    report = build_report([results], base=tmp_path)
    write_report(report, tmp_path / "out")
    text, html = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in (
        "18.000 (-10.00 [-11.00, -9.00])", "-7.69 [-8.69, -6.69]", "41 [30, 50]", "-0.20 [-0.30, -0.10]", "0.6250",
        "3.25", "0.5 (0.25 to 0.75)", "seeds 3", "12 s on", "longmem eval perplexity --model runs/x",
        "has another tokenizer",
        "the backbone's positions end at 8,192", "every token chooses its own share", "backbone of 8.1M parameters",
        "window: 256 tokens (paper: 1,024)", "memory: 64 tokens (paper: 65,536",
    ):  # fmt: skip
        assert said in text, said
        assert said.replace("'", "&#x27;") in html or said in html, said
    names = [block.name for block in report.blocks if isinstance(block, Picture)]
    assert len(names) == len(set(names)) == 6
    for name in names:
        assert f"pictures/{name}.png" in text and f"pictures/{name}-dark.png" in text
        assert (tmp_path / "out" / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_html_page_needs_nothing_else_and_has_both_papers(results: Path) -> None:
    html = build_report([results]).html()
    assert not re.findall(r"<script|<link|@import|url\(|https?://", html)
    sources = re.findall(r'(?:src|srcset)="([^"]{0,30})', html)
    assert len(sources) == 12 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert html.count("prefers-color-scheme: dark") == 7, "the style, and every picture"
    anchors = re.findall(r'<a href="#([^"]+)"', html)
    assert anchors and all(f'id="{anchor}"' in html for anchor in anchors)


def test_the_papers_numbers_stand_beside_ours_of_the_same_kind(results: Path) -> None:
    text = build_report([results]).markdown("pictures")
    beside = text[text.index("Perplexity of books (PG-22)") :]
    assert "| paper: LongMem | 21.29 (-6.5 %) | 23.01 (-5.7 %) |" in beside
    assert "| paper: GPT-2* | 22.78 (r) | 24.39 (r) |" in beside
    assert "| ours: LongMem, 64 tokens | 18.00 (-10.0 %) | 18.00 (-10.0 %) | - | - |" in beside
    assert "ChapterBreak, AO3" in text and "SQuAD, open-ended" not in text


def test_what_is_no_result_is_named_in_one_line_and_the_rest_is_shown(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["report", str(results), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert not done.value.code
    assert captured.out.split() == [str(tmp_path / "out" / f"report.{kind}") for kind in ("md", "html")]
    lines = captured.err.splitlines()
    assert [re.sub(r".*/results/", "", line).split(":")[0] for line in lines] == [
        "cut.json",
        "other.json",
        "broken/perplexity.json",
    ]
    assert all(line.startswith("not shown: ") for line in lines)
    assert "not JSON" in lines[0] and "without header" in lines[1]
    assert lines[2].endswith("a damaged perplexity result ('samples' is missing); measure it again")
    for wrong, line in ((results / "cut.json", "cut.json: not JSON"), (results / "nowhere", "no such file or folder")):
        with pytest.raises(SystemExit) as done:
            main(["report", str(wrong), "--out", str(tmp_path / "other")])
        assert done.value.code == 1 and line in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match="no result files in"):
        build_report([results / "model"])


@pytest.mark.parametrize(
    ("field", "value"), [("samples", ["documents"]), ("samples", {"documents": "many"}), ("seconds", "long")]
)
def test_a_header_that_is_damaged_is_named_and_the_rest_is_shown(tmp_path: Path, field: str, value: Any) -> None:
    good, bad = perplexity_result(), perplexity_result()
    bad["header"][field] = value
    label = perplexity_result() | {"systems": SYSTEMS | {"memory_off": ["no text"]}}
    for name, result in (("good", good), ("bad", bad), ("label", label)):
        write_json(tmp_path / name / "perplexity.json", result)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    report = build_report([tmp_path])
    assert [Path(file.path).parent.name for file in report.files] == ["good"]
    assert sorted(line.split(": ", 1)[1][:10] for line in report.problems) == ["a damaged ", "a damaged ", "not JSON ("]


def test_what_cannot_be_drawn_is_named_and_the_tables_stay(tmp_path: Path) -> None:
    result = perplexity_result()
    for one in result["protocols"]["sliding"]["all"]["by_position"]:
        del one["percent"]
    write_json(tmp_path / "perplexity.json", result)
    report = build_report([tmp_path]).drawn()
    assert len(report.problems) == 1 and report.problems[0].endswith(
        "perplexity by position in the document: cannot be drawn ('percent' is missing); measure it again"
    )
    assert report.problems[0] in report.markdown("p") and "18.000" in report.markdown("p")
    assert [block.name[-14:] for block in report.blocks if isinstance(block, Picture)] == ["by-memory-size"]


def test_text_of_a_result_is_never_markup(tmp_path: Path) -> None:
    result = harness_result()
    result["systems"] = {"backbone": "<img src=x onerror=alert(1)>|`", "memory_64": "a | b"}
    write_json(tmp_path / "harness.json", result)
    report = build_report([tmp_path])
    assert "<img src=x" not in report.html() and "&lt;img src=x" in report.html()
    assert "<img src=x" not in report.markdown("p") and "a \\| b" in report.markdown("p")


def test_pages_are_made_of_few_blocks() -> None:
    blocks = [Heading(1, "A page"), Text("With `code` and **weight**."), Table(["a", "b"], [["x|y", "1"]], "said")]
    assert markdown(blocks, "p") == (
        "# A page\n\nWith `code` and **weight**.\n\nsaid\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
    )
    html = page("A page", blocks)
    assert "<code>code</code> and <strong>weight</strong>" in html
    assert '<th scope="row">x|y</th><td>1</td>' in html


def test_pictures_are_on_light_and_on_dark_paper(results: Path) -> None:
    import io

    from PIL import Image

    blocks = [block for block in build_report([results]).blocks if isinstance(block, Picture)]
    for theme in THEMES:
        with Image.open(io.BytesIO(picture(blocks[0].draw, theme))) as image:
            corner = image.convert("RGB").getpixel((2, 2))
        wanted = tuple(int(theme.paper[at : at + 2], 16) for at in (1, 3, 5))
        assert isinstance(corner, tuple)
        assert max(abs(a - b) for a, b in zip(corner, wanted, strict=True)) <= 3
    assert LIGHT.shade != DARK.shade


def test_the_papers_averages_and_distances_are_its_own() -> None:
    for _, line in paper.ICL.rows.values():
        *sets, average = [figure.value for figure in line if figure is not None]
        assert sum(sets) / 5 == pytest.approx(average, abs=0.06)
    assert [round(paper.relative(paper.BOOKS, column)["LongMem"][0], 1) for column in paper.BOOKS.columns] == [
        -6.5,
        -5.7,
        -6.5,
        -6.5,
    ]
    assert round(paper.relative(paper.ARXIV, "ArXiv")["LongMem"][0], 1) == -9.0
    assert paper.CHAPTERBREAK.of(LONGMEM, "8k")[0][1].value == 40.5
    assert paper.SQUAD.recalled and not paper.ARXIV.recalled
    assert paper.BOOKS.of(BACKBONE, "5k-10k")[0][1].shown() == "22.78 (r)"


@pytest.mark.shared
def test_the_papers_numbers_are_those_written_down_for_the_project(shared_dir: Path) -> None:
    text = (shared_dir / "PAPER.md").read_text(encoding="utf-8")
    for table in paper.TABLES:
        for _, line in table.rows.values():
            for figure in line:
                assert figure is None or f"{figure.value:.{table.digits}f}" in text or f"{figure.value:g}" in text


def test_the_results_page_is_made_of_the_results_that_are_there() -> None:
    made = results_report(ROOT)
    assert not made.problems, "every file of results/ is shown"
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == made.markdown("results"), "docs/results.md is not up to date; run make docs"
    assert not lacks_pictures(made, ROOT / "docs" / "results")


def test_commands_of_results_name_no_machine() -> None:
    for path in sorted((ROOT / "results").rglob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        command = result.get("header", result)["command"]
        assert command.startswith(("longmem ", "python -m benchmarks.")), path
        assert not re.search(r"(^|[\s=])/", command), path
