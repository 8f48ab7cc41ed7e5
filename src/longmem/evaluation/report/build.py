"""From result files to a page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from longmem.errors import DataError
from longmem.evaluation.report.blocks import Block, Heading, Picture, Table, Text, markdown, page
from longmem.evaluation.report.files import ResultFile, read_results
from longmem.evaluation.report.sections import section
from longmem.files import write_whole

log = logging.getLogger(__name__)

DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration, RuntimeError)
"""What reading a result raises where it is not what its kind is; ``StopIteration`` in a generator is a RuntimeError."""

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


@dataclass(frozen=True)
class Report:
    """A page that is not written yet.

    Attributes:
        title: of the page.
        blocks: all of it.
        files: the results in it.
        problems: a line for every file that is not in it.
    """

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

    def drawn(self) -> Report:
        """The same with every picture drawn; what cannot be drawn is named among the problems."""
        blocks, problems = list[Block](), list(self.problems)
        for block in self.blocks:
            if isinstance(block, Picture):
                try:
                    assert block.papers
                except DAMAGED as error:
                    problems.append(f"{block.alt}: cannot be drawn ({_what(error)}); measure it again")
                    block = Text(problems[-1])
            blocks.append(block)
        return Report(self.title, blocks, self.files, problems)

    def save_pictures(self, folder: Path) -> list[Path]:
        """PNG files, each on light and on dark paper."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for block in self.blocks:
            if isinstance(block, Picture):
                for end, png in zip(("", "-dark"), block.papers, strict=True):
                    written.append(folder / f"{block.name}{end}.png")
                    written[-1].write_bytes(png)
        return written


def build_report(
    paths: Sequence[str | Path], *, title: str = "Results", intro: Sequence[str] = (), base: Path | None = None
) -> Report:
    """Read results and lay them out.

    Args:
        paths: files and folders.
        title: of the page.
        intro: paragraphs below it.
        base: paths below it are shown as seen from there.

    Raises:
        DataError: a path is not there, or none of the files is a result.
    """
    files, problems = read_results(paths, base)
    parts, shown, rows = list[Block](), list[ResultFile](), list[list[str]]()
    for name, some in groupby(files, key=lambda file: file.task if file.kind == "task" else file.kind):
        group: list[Block] = []
        for file in some:
            try:
                part, row = section(file), _row(file)
                markdown([*part, _overview([row])], "")  # says now what cannot be written: cells that are no text
                group += part
                rows.append(row)
                shown.append(file)
            except DAMAGED as error:
                problems.append(f"{file.path}: a damaged {file.kind} result ({_what(error)}); measure it again")
        if group:
            parts += [Heading(2, TITLES.get(name, name)), *group]
    if not shown:
        raise DataError("; ".join(problems))
    blocks: list[Block] = [Heading(1, title), *(Text(text) for text in intro), _overview(rows), *parts]
    if problems:
        blocks += [Heading(2, "Not shown"), *(Text(problem) for problem in problems)]
    return Report(title, blocks, shown, problems)


def write_report(report: Report, out: Path) -> list[Path]:
    """``report.md`` with its pictures in ``pictures/``, and ``report.html``; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = report.save_pictures(out / "pictures")
    write_whole(out / "report.md", [report.markdown("pictures")])
    write_whole(out / "report.html", [report.html()])
    return [out / "report.md", out / "report.html", *pictures]


def _what(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{said} is missing" if isinstance(error, KeyError) else said or type(error).__name__


def _overview(rows: list[list[str]]) -> Table:
    """Which results there are, over which data, with which seeds and at what cost."""
    return Table(["what", "file", "measured", "seeds", "took"], rows, numbers=False)


def _row(file: ResultFile) -> list[str]:
    counts = {k: n for k, n in file.header.get("samples", {}).items() if k not in ("words", "bytes")}
    samples = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    seconds = file.header.get("seconds") or 0
    seeds = ", ".join(map(str, file.header.get("seeds", []))) or str(file.data.get("seed", "-"))
    cost = f"{seconds:,.0f} s" if seconds else "-"
    what = TITLES.get(file.task, TITLES.get(file.kind, file.task))
    return [what, f"`{file.path}`", samples or "-", seeds, cost]
