"""Result files as one page: tables, pictures, the paper's numbers beside ours, and how each was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from longmem.errors import DataError
from longmem.evaluation.pages import Block, Heading, Picture, Table, Text, markdown, page
from longmem.evaluation.plots import pictures_of
from longmem.evaluation.results import Json
from longmem.evaluation.tables import kind_of, tables_of
from longmem.files import write_whole

TITLES = {
    "perplexity": "Perplexity of long text",
    "chapterbreak": "ChapterBreak",
    "icl": "In-context learning",
    "squad": "SQuAD",
    "needle": "Needle in a haystack",
    "dialogue": "Dialogue",
    "harness": "lm-evaluation-harness",
    "ablate": "Ablations",
    "efficiency": "Efficiency",
    "layers": "Which layer to remember",
    "bench": "Speed and storage",
}
"""Headings, in the order in which results are shown."""

# What the paper reports, to be shown beside our results: Wang et al., NeurIPS 2023 (arXiv 2306.07174). A number marked
# (r) was recalled from the paper's tables and checked only by its sums and differences: it shows the shape, and is no
# pass mark. In perplexities, % is the distance from the paper's own backbone.
SETTING = (
    "**The paper's setting.** GPT-2*, 407M parameters, 24 layers, window of 1,024; SideNet of 151M, trained on 26B "
    "tokens of the Pile; memory of 65,536 tokens, 64 retrieved, chunks of 4. (r): recalled from the paper's tables, "
    "not checked against them. Models, texts and vocabularies differ from ours: compare distances, not numbers."
)

BOOKS = Table(
    ["paper, books (PG-22)", "5k-10k tokens", "10k-100k", "100k-500k", "500k-1M"],
    [
        ["GPT-2*", "22.78 (r)", "24.39 (r)", "24.12 (r)", "24.97 (r)"],
        ["MemTRM", "21.77 (-4.4 %)", "23.56 (-3.4 %)", "23.23 (r, -3.7 %)", "24.16 (r, -3.2 %)"],
        ["LongMem", "21.29 (-6.5 %)", "23.01 (-5.7 %)", "22.55 (r, -6.5 %)", "23.35 (r, -6.5 %)"],
    ],
    "Perplexity by segments of 1,024 tokens, by length of the document.",
)
ARXIV = Table(
    ["paper, arXiv", "perplexity"],
    [["GPT-2*", "11.05"], ["MemTRM", "10.81 (-2.2 %)"], ["LongMem", "10.05 (-9.0 %)"]],
    "Perplexity of LaTeX by segments of 1,024 tokens.",
)
TASKS = {
    "chapterbreak": Table(
        ["paper, ChapterBreak AO3", "4k", "6k", "8k"],
        [
            ["GPT-2*", "18.4", "-", "-"],
            ["MemTRM", "28.3", "-", "-"],
            ["GPT-3, window of 2k", "28.0", "-", "-"],
            ["LongMem", "37.7", "39.4 (r)", "40.5"],
        ],
        "Suffix identification, accuracy in %; chance 16.7.",
    ),
    "icl": Table(
        ["paper, demonstrations in window + memory", "SST-2", "MR", "Subj", "SST-5", "MPQA", "average"],
        [
            ["GPT-2*, 20", "68.2 (r)", "63.4 (r)", "57.6 (r)", "33.6 (r)", "70.8 (r)", "58.7"],
            ["MemTRM, 20 + 2,000", "65.1 (r)", "65.1 (r)", "58.2 (r)", "31.9 (r)", "72.7 (r)", "58.6"],
            ["LongMem, 4 + 2,000", "71.8 (r)", "65.1 (r)", "53.8 (r)", "36.0 (r)", "65.4 (r)", "58.4"],
            ["LongMem, 20 + 2,000", "78.0 (r)", "78.6 (r)", "65.6 (r)", "36.5 (r)", "74.6 (r)", "66.7"],
        ],
        "Accuracy in %, mean of six seeds.",
    ),
    "squad": Table(
        ["paper, SQuAD, 3 demonstrations in the window and 200 in memory", "EM", "F1"],
        [["GPT-2*", "22.28 (r)", "30.78 (r)"], ["LongMem", "26.77 (r)", "35.70 (r)"]],
    ),
}

OTHER_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "run.json")
"""Files of checkpoints and runs, which may be in the same folders as results."""


class ResultFile(NamedTuple):
    """A result as it is in its file; ``kind`` is a key of ``TITLES``."""

    path: str
    kind: str
    data: Json

    @property
    def name(self) -> str:
        """``results/books/perplexity.json`` is ``books``."""
        parts = Path(self.path).with_suffix("").parts
        if "results" in parts[:-1]:
            parts = parts[parts.index("results") + 1 :]
        return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == self.kind else parts[-2:])


class Report(NamedTuple):
    """A page that is not written yet; ``problems`` has a line for every file that is not in it."""

    title: str
    blocks: list[Block]
    files: list[ResultFile]
    problems: list[str]

    def markdown(self, pictures: str) -> str:
        """The page; ``pictures`` is the folder of its pictures as seen from it."""
        return markdown(self.blocks, pictures)

    def html(self) -> str:
        """The same as one file that needs nothing else."""
        return page(self.title, self.blocks)

    def write_pictures(self, folder: Path) -> list[Path]:
        """SVG files; those of other reports are removed."""
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {folder / f"{b.name}.svg": b.svg for b in self.blocks if isinstance(b, Picture)}
        for path in set(folder.glob("*.svg")) - pictures.keys():
            path.unlink()
        for path, svg in pictures.items():
            path.write_text(svg, encoding="utf-8")
        return list(pictures)


def build_report(
    paths: Sequence[str | Path],
    *,
    title: str = "Results",
    intro: Sequence[str] = (),
    base: Path | None = None,
    most_tables: Mapping[str, int] | None = None,
) -> Report:
    """Read results, files and folders that are searched to their ends, and lay them out.

    Args:
        intro: paragraphs below the title.
        base: paths below it are shown as seen from there.
        most_tables: of each result by its kind, else one; None is all.

    Raises:
        DataError: a path is not there, or none of the files is a result.
    """
    found, problems = list[tuple[ResultFile, list[Block]]](), list[str]()
    for file in _files(paths):
        inside = base is not None and file.resolve().is_relative_to(base.resolve())
        shown = (file.resolve().relative_to(base.resolve()) if base and inside else file).as_posix()
        try:
            result = _read(file, shown)
            section = list(_section(result, None if most_tables is None else most_tables.get(result.kind, 1)))
            markdown(section, "")  # finds cells that are no text
            for block in section:
                assert not isinstance(block, Picture) or block.svg
        except (DataError, OSError) as problem:
            problems.append(f"{shown}: {problem}")
        except Exception as error:  # a result that lacks what its kind has raises anything
            what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            problems.append(f"{shown}: a damaged result ({what}); measure it again")
        else:
            found.append((result, section))
    if not found:
        raise DataError("; ".join(problems) or f"no result files in {', '.join(map(str, paths))}")
    order, blocks = list(TITLES), list[Block]()
    found.sort(key=lambda pair: (order.index(pair[0].kind), pair[0].path))
    for kind, some in groupby(found, key=lambda pair: pair[0].kind):
        blocks += [Heading(2, TITLES[kind]), *(block for _, section in some for block in section)]
    if any(beside(result.data, result.name) for result, _ in found):
        blocks.insert(0, Text(SETTING))
    if problems:
        blocks += [Heading(2, "Not shown"), *map(Text, problems)]
    files = [result for result, _ in found]
    return Report(title, [Heading(1, title), *map(Text, intro), *blocks], files, problems)


def write_report(report: Report, out: Path) -> list[Path]:
    """``report.md`` with its pictures in ``pictures/``, and ``report.html``; returns the files."""
    pictures = report.write_pictures(out / "pictures")
    write_whole(out / "report.md", [report.markdown("pictures")])
    write_whole(out / "report.html", [report.html()])
    return [out / "report.md", out / "report.html", *pictures]


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; name result files (JSON) or folders of them")
        inside = sorted(path.rglob("*.json")) if path.is_dir() else []
        yield from (f for f in inside if f.name not in OTHER_FILES and not f.name.endswith(".index.json"))
        yield from () if path.is_dir() else (path,)


def _read(file: Path, shown: str) -> ResultFile:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is nested a thousand times deep is not ours either
        raise DataError(f"not JSON ({error}); it was cut short or is something else") from error
    if not isinstance(data, dict):
        raise DataError("not a result of longmem: no object at its top")
    kind = kind_of(data)
    task = data["header"].get("task") if isinstance(data.get("header"), dict) else None
    kind = task if kind == "task" and task in TITLES else kind
    if kind not in TITLES:
        what = f"of an unknown task ({task!r})" if task else "without header and command"
        raise DataError(f"not a result that can be shown: JSON {what}")
    return ResultFile(shown, kind, data)


def _section(file: ResultFile, most_tables: int | None) -> Iterator[Block]:
    yield Heading(3, file.name)
    yield from tables_of(file.data)[:most_tables]
    yield from pictures_of(file.data, f"{file.name}-".replace("/", "-"))
    paper: Table | None = beside(file.data, file.name)
    if paper is not None:
        yield paper
    yield Text(_origin(file))


def _origin(file: ResultFile) -> str:
    """Command, seeds, cost, versions and machine."""
    header = file.data.get("header")
    if header is None and not file.data["command"]:
        return f"`{file.path}`: {file.data['reported']}."
    if header is None:
        around = file.data.get("surroundings", {})
        where = f"{around.get('machine', '?')}, {around.get('threads', '?')} thread(s), {around.get('date', '')}"
        return f"`{file.path}`, made by `{file.data['command']}`; seed {file.data.get('seed', '-')}; {where}."
    machine, versions = header.get("machine", {}), header.get("versions", {})
    made = f"`{header['command']}`" if header.get("command") else "a call from Python"
    place = machine.get("gpu") or f"{machine.get('torch_threads', '?')} CPU thread(s)"
    cost = f"{header['seconds']:,.0f} s on {place}" if header.get("seconds") else f"on {place}"
    counts = ", ".join(f"{n:,} {what}" for what, n in header["samples"].items() if what not in ("words", "bytes"))
    said = f"longmem {versions.get('longmem', '?')}, torch {versions.get('torch', '?')}"
    seeds = ", ".join(map(str, header.get("seeds", []))) or "none"
    return f"`{file.path}`, made by {made}; {counts}; seeds {seeds}; {cost}; {said}; {header.get('created', '')[:10]}."


def beside(result: Json, name: str) -> Table | None:
    """The paper's table of the same kind of measurement; the file's name and ``--data`` tell books from LaTeX."""
    if "protocols" not in result or "axes" in result:
        return TASKS.get(result.get("header", {}).get("task", ""))
    said = " ".join(map(str, [*result["header"]["config"].get("data", []), name])).lower()
    if "latex" in said or "arxiv" in said:
        return ARXIV
    return BOOKS if any(word in said for word in ("book", "pg19", "pg22", "gutenberg")) else None
