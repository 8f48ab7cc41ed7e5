"""Result files as one page: tables, pictures, the paper's numbers beside ours, and how each was made.

A page is a list of blocks, written as Markdown or as HTML. Text is plain but for `code` in backticks and **bold**; text
from a result file is never markup.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from longmem.errors import DataError
from longmem.evaluation.plots import Picture, pictures_of
from longmem.evaluation.results import Json
from longmem.evaluation.tables import Table, kind_of, tables_of
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
OTHER_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "run.json")
"""Files of checkpoints and runs, which may be in the same folders as results."""


class Heading(NamedTuple):
    """Level 1 is the page's title."""

    level: int
    text: str


Block = Heading | str | Table | Picture
"""A string is a paragraph."""


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

    def html(self) -> str:
        """One file: pictures within, no scripts, nothing fetched; light or dark as the reader's system."""
        from markdown_it import MarkdownIt

        text = markdown(self.blocks, "pictures")
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
        for block in self.blocks:
            if isinstance(block, Picture):
                data = base64.b64encode(block.svg.encode()).decode("ascii")
                body = body.replace(f'src="pictures/{block.name}.svg"', f'src="data:image/svg+xml;base64,{data}"')
        page = (files("longmem.evaluation") / "report.html").read_text(encoding="utf-8")
        return page.replace("{title}", html.escape(self.title)).replace("{body}", body)

    def write_pictures(self, folder: Path) -> list[Path]:
        """SVG files; those of other reports are removed."""
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {folder / f"{b.name}.svg": b.svg for b in self.blocks if isinstance(b, Picture)}
        for path in set(folder.glob("*.svg")) - pictures.keys():
            path.unlink()
        for path, svg in pictures.items():
            path.write_text(svg, encoding="utf-8")
        return list(pictures)


def markdown(blocks: Sequence[Block], pictures: str) -> str:
    """The page as Markdown; ``pictures`` is the folder of its pictures, as seen from the page."""
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escaped(text)}"
        case Table(heads, rows, caption):
            lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
            table = "\n".join(f"| {' | '.join(_escaped(cell, in_table=True) for cell in line)} |" for line in lines)
            return f"{_escaped(caption)}\n\n{table}" if caption else table
        case Picture(name, alt):
            return f"![{_escaped(alt)}]({pictures}/{name}.svg)"
    return _escaped(block)


def _escaped(text: str, in_table: bool = False) -> str:
    """Text of a result file is never markup or a link: nothing of a page is fetched."""
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("](", "]\\(") for p in parts)
    return text.replace("|", "\\|").replace("\n", " ") if in_table else text


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
        base: paths are shown as seen from there.
        most_tables: of each result by its kind, else one; None is all.

    Raises:
        DataError: a path is not there, or none of the files is a result.
    """
    found, problems = list[tuple[ResultFile, list[Block]]](), list[str]()
    for file in _files(paths):
        shown = Path(file if base is None else os.path.relpath(file, base)).as_posix()
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
    if any(beside(result) for result, _ in found):
        blocks.insert(0, paper()["setting"])
    if problems:
        blocks += [Heading(2, "Not shown"), *problems]
    return Report(title, [Heading(1, title), *intro, *blocks], [result for result, _ in found], problems)


def write_report(report: Report, out: Path) -> list[Path]:
    """``report.md`` with its pictures in ``pictures/``, and ``report.html``; returns the files."""
    pictures = report.write_pictures(out / "pictures")
    write_whole(out / "report.md", [markdown(report.blocks, "pictures")])
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
    if (table := beside(file)) is not None:
        yield table
    yield _origin(file)


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


def paper() -> Json:
    """What the paper reports: Wang et al., NeurIPS 2023 (arXiv 2306.07174); ``setting``, and tables by name.

    A number marked (r) was recalled from the paper's tables and checked only by its sums and differences: it shows the
    shape, and is no pass mark. In perplexities, % is the distance from the paper's own backbone.
    """
    found: Json = json.loads((files("longmem.evaluation") / "paper.json").read_text(encoding="utf-8"))
    return {name: each if name == "setting" else Table(**each) for name, each in found.items()}


def beside(file: ResultFile) -> Table | None:
    """The paper's table of the same kind of measurement; the file's name and ``--data`` tell books from LaTeX."""
    if file.kind != "perplexity":
        return paper().get(file.kind)
    said = " ".join(map(str, [*file.data["header"]["config"].get("data", []), file.name])).lower()
    if "latex" in said or "arxiv" in said:
        return paper()["latex"]  # type: ignore[no-any-return]
    books = any(word in said for word in ("book", "pg19", "pg22", "gutenberg"))
    return paper()["books"] if books else None
