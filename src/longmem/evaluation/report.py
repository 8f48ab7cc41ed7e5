"""Result files as one page: tables, pictures, the paper's numbers beside ours, and how each was made.

A page is Markdown; its HTML is made of that. Text from a result file is never markup.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from longmem.errors import DataError
from longmem.evaluation.plots import pictures_of
from longmem.evaluation.results import Json
from longmem.evaluation.tables import Table, escaped, kind_of, markdown, tables_of
from longmem.files import write_whole

TITLES = {
    "perplexity": "Perplexity of long text",
    "chapterbreak": "ChapterBreak",
    "icl": "In-context learning",
    "squad": "SQuAD",
    "needle": "Needle in a haystack",
    "facts": "Facts of earlier conversations",
    "babi": "bAbI in long text",
    "dialogue": "Dialogue",
    "harness": "lm-evaluation-harness",
    "ablate": "Ablations",
    "efficiency": "Efficiency",
    "layers": "Which layer to remember",
    "bench": "Speed and storage",
}
"""Headings, in the order in which results are shown; a task of another name comes last, under its name."""
OTHER_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "run.json")
"""Files of checkpoints and runs, which may be in the same folders as results."""


class Report(NamedTuple):
    """A page that is not written yet.

    Attributes:
        text: Markdown.
        pictures: SVG by the path of its file, as seen from the page.
        shown: paths of the results that are on it.
        problems: a line for every file that is not.
    """

    title: str
    text: str
    pictures: dict[str, str]
    shown: list[str]
    problems: list[str]

    def html(self) -> str:
        """One file: pictures within, no scripts, nothing fetched; light or dark as the reader's system."""
        from markdown_it import MarkdownIt

        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(self.text)
        for path, svg in self.pictures.items():
            data = base64.b64encode(svg.encode()).decode("ascii")
            body = body.replace(f'src="{path}"', f'src="data:image/svg+xml;base64,{data}"')
        page = (files("longmem.evaluation") / "report.html").read_text(encoding="utf-8")
        return page.replace("{title}", html.escape(self.title)).replace("{body}", body)

    def write_pictures(self, out: Path) -> list[Path]:
        """Write the pictures of a page in ``out``; those of other pages are removed from their folders."""
        written = {out / path: svg for path, svg in self.pictures.items()}
        for folder in {path.parent for path in written}:
            folder.mkdir(parents=True, exist_ok=True)
            for old in set(folder.glob("*.svg")) - written.keys():
                old.unlink()
        for path, svg in written.items():
            path.write_text(svg, encoding="utf-8")
        return list(written)


def build_report(
    paths: Sequence[str | Path],
    *,
    title: str = "Results",
    intro: Sequence[str] = (),
    base: Path | None = None,
    folder: str = "pictures",
    most_tables: Mapping[str, int] | None = None,
) -> Report:
    """Read results, files and folders that are searched to their ends, and lay them out.

    Args:
        intro: paragraphs below the title.
        base: paths are shown as seen from there.
        folder: of pictures, as seen from the page.
        most_tables: of each result by its kind, else one; None is all.

    Raises:
        DataError: a path is not there, or none of the files is a result.
    """
    found: dict[str, list[str]] = {kind: [] for kind in TITLES}
    report = Report(title, "", {}, [], [])
    named = {Path(file if base is None else os.path.relpath(file, base)).as_posix(): file for file in _files(paths)}
    compared = False
    for path, file in sorted(named.items()):
        try:
            kind, result = _read(file)
            name = _name(path, kind)
            tables = tables_of(result)[: None if most_tables is None else most_tables.get(kind, 1)]
            pictures = list(pictures_of(result, re.sub(r"[^\w.-]+", "-", f"{name}-")))
            drawn = {f"{folder}/{picture.name}.svg": picture for picture in pictures}
            section = [f"### {escaped(name)}", *map(markdown, tables)]
            section += [f"![{escaped(picture.alt)}]({where})" for where, picture in drawn.items()]
            papers = beside(kind, f"{name} {result.get('header', {}).get('config', {}).get('data')}")
            section += [*map(markdown, papers), _origin(path, result)]
            svgs = {where: picture.svg() for where, picture in drawn.items()}
        except (DataError, OSError) as problem:
            report.problems.append(f"{path}: {problem}")
        except Exception as error:  # a result that lacks what its kind has raises anything
            what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            report.problems.append(f"{path}: a damaged result ({what}); measure it again")
        else:
            found.setdefault(kind, []).extend(section)
            report.pictures.update(svgs)
            report.shown.append(path)
            compared = compared or bool(papers)
    if not report.shown:
        raise DataError("; ".join(report.problems) or f"no result files in {', '.join(map(str, paths))}")
    text = [f"# {escaped(title)}", *intro, *([paper()["setting"]] if compared else [])]
    for kind, sections in found.items():
        text += [f"## {escaped(TITLES.get(kind, kind))}", *sections] if sections else []
    text += ["## Not shown", *map(escaped, report.problems)] if report.problems else []
    return report._replace(text="\n\n".join(text) + "\n")


def write_report(report: Report, out: Path) -> list[Path]:
    """``report.md`` with its pictures in a folder, and ``report.html``; returns the files."""
    pictures = report.write_pictures(out)
    write_whole(out / "report.md", [report.text])
    write_whole(out / "report.html", [report.html()])
    return [out / "report.md", out / "report.html", *pictures]


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; name result files (JSON) or folders of them")
        inside = path.rglob("*.json") if path.is_dir() else []
        yield from (f for f in inside if f.name not in OTHER_FILES and not f.name.endswith(".index.json"))
        yield from () if path.is_dir() else (path,)


def _read(file: Path) -> tuple[str, Json]:
    """Kind, a task's own name among them, and content."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is nested a thousand times deep is not ours either
        raise DataError(f"not JSON ({error}); it was cut short or is something else") from error
    kind = kind_of(data) if isinstance(data, dict) else None
    if kind is None:
        raise DataError("not a result of longmem that can be shown")
    return str(data["header"]["task"]) if kind == "task" else kind, data


def _name(path: str, kind: str) -> str:
    """``results/books/perplexity.json`` is ``books``."""
    parts = Path(path).with_suffix("").parts
    if "results" in parts[:-1]:
        parts = parts[parts.index("results") + 1 :]
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == kind else parts[-2:])


def _origin(path: str, result: Json) -> str:
    """Command, seeds, cost, versions and machine."""
    header = result.get("header")
    if header is None and not result["command"]:
        return escaped(f"`{path}`: {result['reported']}.")
    if header is None:
        around = result.get("surroundings", {})
        where = f"{around.get('machine', '?')}, {around.get('threads', '?')} thread(s), {around.get('date', '')}"
        return escaped(f"`{path}`, made by `{result['command']}`; seed {result.get('seed', '-')}; {where}.")
    machine, versions = header.get("machine", {}), header.get("versions", {})
    made = f"`{header['command']}`" if header.get("command") else "a call from Python"
    place = machine.get("gpu") or f"{machine.get('torch_threads', '?')} CPU thread(s)"
    cost = f"{header['seconds']:,.0f} s on {place}" if header.get("seconds") else f"on {place}"
    counts = ", ".join(f"{n:,} {what}" for what, n in header["samples"].items() if what not in ("words", "bytes"))
    said = f"longmem {versions.get('longmem', '?')}, torch {versions.get('torch', '?')}"
    seeds = ", ".join(map(str, header.get("seeds", []))) or "none"
    date = header.get("created", "")[:10]
    return escaped(f"`{path}`, made by {made}; {counts}; seeds {seeds}; {cost}; {said}; {date}.")


def paper() -> Json:
    """What the paper reports: Wang et al., NeurIPS 2023 (arXiv 2306.07174); ``setting``, and tables by name.

    A number marked (r) was recalled from the paper's tables and checked only by its sums and differences: it shows the
    shape, and is no pass mark. In perplexities, % is the distance from the paper's own backbone.
    """
    found: Json = json.loads((files("longmem.evaluation") / "paper.json").read_text(encoding="utf-8"))
    return {name: each if name == "setting" else Table(**each) for name, each in found.items()}


def beside(kind: str, said: str) -> list[Table]:
    """The paper's table of the same kind of measurement; what a result says of itself tells books from LaTeX."""
    if kind == "perplexity":
        said = said.lower()
        books = any(word in said for word in ("book", "pg19", "pg22", "gutenberg"))
        kind = "latex" if "latex" in said or "arxiv" in said else "books" if books else kind
    return [table for name, table in paper().items() if name == kind]
