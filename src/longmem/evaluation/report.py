"""Result files as one page: tables, pictures, the paper's numbers beside ours, and how each was made.

A page is Markdown; its HTML is made of that. Text from a result file is never markup. Hues of pictures are Okabe and
Ito's, told apart by every kind of colour vision and read on light and on dark paper; markers and dashes say the same
without colour.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longmem.errors import DataError
from longmem.evaluation.results import Json
from longmem.evaluation.systems import (
    BACKBONE,
    CONTROL,
    LONGMEM,
    MEMORY_OFF,
    MEMTRM,
    MEMTRM_OFF,
    TRAINING_FREE,
    WINDOW,
    largest,
    sized,
)
from longmem.evaluation.tables import (
    beside,
    escaped,
    farthest,
    kind_of,
    markdown,
    paper,
    protocol_title,
    recommended,
    tables_of,
)
from longmem.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

    def write(self, out: Path) -> list[Path]:
        """``report.md``, ``report.html``, and the pictures in their folder; returns the files."""
        made = {"report.md": self.text, "report.html": self.html(), **self.pictures}
        for path, text in made.items():
            write_whole(out / path, [text])
        return [out / path for path in made]


class Section(NamedTuple):
    """One result on a page: Markdown, pictures as in ``Report``, and whether a table of the paper is beside it."""

    text: str
    pictures: dict[str, str]
    compared: bool


def build_report(paths: Sequence[str | Path], *, title: str = "Results") -> Report:
    """Read results, files and folders that are searched to their ends, and lay them out.

    Raises:
        DataError: a path is not there, or none of the files is a result.
    """
    found: dict[str, list[str]] = {kind: [] for kind in TITLES}
    report, compared = Report(title, "", {}, [], []), False
    for path in sorted(set(_files(paths))):
        name = path.as_posix()
        try:
            result = _read(path)
            kind = str(kind_of(result))
            made = section(name, result)
        except (DataError, OSError) as problem:
            report.problems.append(f"{name}: {problem}")
        except Exception as error:  # a result that lacks what its kind has raises anything
            what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            report.problems.append(f"{name}: a damaged result ({what}); measure it again")
        else:
            found.setdefault(kind, []).extend([f"### {escaped(_name(name, kind))}", made.text])
            report.pictures.update(made.pictures)
            report.shown.append(name)
            compared = compared or made.compared
    if not report.shown:
        raise DataError("; ".join(report.problems) or f"no result files in {', '.join(map(str, paths))}")
    text = [f"# {escaped(title)}", *([paper()["setting"]] if compared else [])]
    for kind, sections in found.items():
        text += [f"## {escaped(TITLES.get(kind, kind))}", *sections] if sections else []
    text += ["## Not shown", *map(escaped, report.problems)] if report.problems else []
    return report._replace(text="\n\n".join(text) + "\n")


def section(path: str, result: Json, *, folder: str = "pictures", most_tables: int | None = None) -> Section:
    """A result as Markdown: tables, pictures, the paper's table of the same kind, and how it was made.

    Args:
        path: of its file, as it is named on the page.
        folder: of pictures, as seen from the page.
        most_tables: the first so many; None is all.
    """
    kind = str(kind_of(result))
    name = _name(path, kind)
    pictures = {f"{folder}/{p.name}.svg": p for p in pictures_of(result, re.sub(r"[^\w.-]+", "-", f"{name}-"))}
    papers = beside(kind, f"{name} {result.get('header', {}).get('config', {}).get('data')}")
    parts = [
        *map(markdown, tables_of(result)[:most_tables]),
        *(f"![{escaped(picture.alt)}]({where})" for where, picture in pictures.items()),
        *map(markdown, papers),
        _origin(path, result),
    ]
    drawn = {where: picture.svg() for where, picture in pictures.items()}
    return Section("\n\n".join(parts), drawn, bool(papers))


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; name result files (JSON) or folders of them")
        inside = path.rglob("*.json") if path.is_dir() else []
        yield from (f for f in inside if f.name not in OTHER_FILES and not f.name.endswith(".index.json"))
        yield from () if path.is_dir() else (path,)


def _read(file: Path) -> Json:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is nested a thousand times deep is not ours either
        raise DataError(f"not JSON ({error}); it was cut short or is something else") from error
    if not isinstance(result, dict) or kind_of(result) is None:
        raise DataError("not a result of longmem that can be shown")
    return result


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
    machine, versions = header["machine"], header["versions"]
    made = f"`{header['command']}`" if header["command"] else "a call from Python"
    place = machine["gpu"] or f"{machine['torch_threads']} CPU thread(s)"
    cost = f"{header['seconds']:,.0f} s on {place}" if header["seconds"] else f"on {place}"
    counts = ", ".join(f"{n:,} {what}" for what, n in header["samples"].items() if what not in ("words", "bytes"))
    said = f"longmem {versions['longmem']}, torch {versions['torch']}"
    seeds = ", ".join(map(str, header["seeds"])) or "none"
    date = header["created"][:10]
    return escaped(f"`{path}`, made by {made}; {counts}; seeds {seeds}; {cost}; {said}; {date}.")


# pictures

INK = "#848b93"
LOOKS = {
    BACKBONE: (INK, "o", "-"),
    MEMORY_OFF: ("#d98b00", "s", "--"),
    CONTROL: ("#14a077", "^", "-."),
    LONGMEM: ("#2f8bd0", "D", "-"),
    MEMTRM: ("#e0602a", "<", "-"),
    MEMTRM_OFF: ("#e0602a", "s", ":"),
    TRAINING_FREE: ("#c272a4", ">", "-."),
    WINDOW: ("#98a0a7", "P", ":"),
}
"""Colour, marker and dashes of a system or a kind of memory."""
FEWEST_TOKENS = 1000  # a position bin with fewer is noise and is not drawn
NEEDLE = re.compile(r"(.+), ([\d,]+) tokens, depth ([\d.]+) %")


class Picture(NamedTuple):
    """Drawn in colours that can be read on light and on dark paper; ``name`` is its file's, without a suffix."""

    name: str
    alt: str
    figure: Figure

    def svg(self) -> str:
        """On transparent paper."""
        import matplotlib

        written = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        return written.getvalue()


def pictures_of(result: Json, name: str = "") -> Iterator[Picture]:
    """All pictures of a result; ``name`` begins the names of their files."""
    kind = kind_of(result)
    if kind == "perplexity":
        alt = "perplexity by position in the document"
        yield Picture(f"{name}perplexity-by-position", alt, position_figure(result))
        if BACKBONE in result["systems"] and any(map(sized, result["systems"])):
            yield Picture(f"{name}perplexity-by-memory-size", "perplexity by memory size", memory_figure(result))
    elif kind == "layers":
        yield Picture(f"{name}layers", "what the heads of each layer find", layers_figure(result))
    elif kind == "needle":
        for metric in result["metrics"]:
            alt = f"{metric['label']} by depth and length"
            yield Picture(f"{name}needle-{metric['name']}", alt, needle_figure(result, metric))


def plot_all(result: Json, folder: Path) -> list[Path]:
    """Write every picture of a result as PNG, on white; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures_of(result):
        written.append(folder / f"{picture.name}.png")
        picture.figure.savefig(written[-1], dpi=150)
    return written


def position_figure(result: Json) -> Figure:
    """Above: perplexity by position in the document. Below: the same in % of the backbone's, where small gains show."""
    protocols, systems = result["protocols"].values(), result["systems"]
    figure, axes = panels(len(protocols), rows=2)
    for column, scores in enumerate(protocols):
        every = scores["all"]["by_position"]
        bins = [one for one in every if one["tokens"] >= FEWEST_TOKENS] or every
        middles = [max((one["low"] * one["high"]) ** 0.5, one["high"] / 2) for one in bins]
        for row, number in enumerate(("perplexity", "percent")):
            for name in largest(systems):
                axes[row][column].plot(middles, [one[number][name] for one in bins], label=systems[name], **look(name))
            tokens_axis(axes[row][column], "position in the document (tokens)", [one["high"] for one in bins])
        axes[0][column].set_title(protocol_title(scores))
    axes[0][0].set_ylabel("perplexity per token")
    first = next(iter(systems))
    axes[1][0].set_ylabel("% against the backbone" if first == BACKBONE else f"% against {systems[first]}")
    return legend(figure)


def memory_figure(result: Json) -> Figure:
    """% against the backbone by memory size, with intervals; the systems without memory as lines."""
    kinds: dict[str, list[int]] = {}
    for kind, size in filter(None, map(sized, result["systems"])):
        kinds.setdefault(kind, []).append(size)
    figure, (axes,) = panels(len(result["protocols"]))
    for axis, scores in zip(axes, result["protocols"].values(), strict=True):
        gaps = {d["system"]: d for d in scores["all"]["differences"] if d["against"] == BACKBONE}
        for kind, sizes in kinds.items():
            found = [gaps[f"{kind}_{size}"] for size in sizes]
            label = result["systems"][f"{kind}_{sizes[0]}"].split(",")[0]
            axis.plot(sizes, [gap["percent"] for gap in found], label=label, **look(kind))
            for size, gap in zip(sizes, found, strict=True):
                if edges := gap["documents"] or gap["blocks"]:
                    axis.vlines(size, edges["low"], edges["high"], color=look(kind)["color"], linewidth=1)
        for name, label in result["systems"].items():
            if sized(name) is None:
                level = gaps[name]["percent"] if name in gaps else 0.0
                axis.axhline(level, label=label, linewidth=1.4, **{k: look(name)[k] for k in ("color", "linestyle")})
        axis.set_title(protocol_title(scores))
        tokens_axis(axis, "memory (tokens)", [size for sizes in kinds.values() for size in sizes])
    axes[0].set_ylabel("% against the backbone")
    return legend(figure)


def needle_figure(result: Json, metric: Json) -> Figure:
    """Depth against length, a map for each system and kind of needle, all in one scale."""
    cells: dict[tuple[str, str], dict[tuple[int, float], float]] = {}
    for group in result["groups"]:
        if where := NEEDLE.fullmatch(group["group"]):
            place = (int(where[2].replace(",", "")), float(where[3]))
            for score in group["scores"]:
                if score["metric"] == metric["name"]:
                    cells.setdefault((where[1], score["system"]), {})[place] = score["value"]
    columns = min(3, len(cells))
    figure, axes = panels(columns, rows=-(-len(cells) // columns))
    flat = [axis for row in axes for axis in row]
    for axis, ((kind, system), values) in zip(flat, cells.items(), strict=False):
        lengths, depths = sorted({length for length, _ in values}), sorted({depth for _, depth in values})
        grid = [[values[length, depth] for length in lengths] for depth in depths]
        heat_map(axis, grid, [short(length) for length in lengths], [f"{depth:g} %" for depth in depths])
        axis.set_title(f"{result['systems'][system]}\n{kind}", fontsize=9)
    for axis in flat[len(cells) :]:
        axis.set_visible(False)
    figure.suptitle(metric["label"] + " (%), depth by length", fontsize=10, color=INK)
    return figure


def layers_figure(result: Json) -> Figure:
    """Recall of every head, layers from bottom to top, at the greatest distance of each source."""
    layers, far = sorted(result["scores"], key=int), farthest(result)
    figure, (axes,) = panels(len(far), height=max(3.0, 0.22 * len(layers) + 1.2))
    for axis, ranks in zip(axes, far.values(), strict=True):
        widest = max(len(row) for row in ranks["recall"].values())
        rows = [[100 * value for value in ranks["recall"][layer]] for layer in layers]
        rows = [row + [float("nan")] * (widest - len(row)) for row in rows]
        names = [f"▸ {layer}" if int(layer) in recommended(result) else str(layer) for layer in layers]
        heat_map(axis, rows, [str(head) for head in range(widest)], names)
        axis.invert_yaxis()
        axis.set_title(f"{ranks['source']}, {ranks['distance']} tokens apart: right chunk found (%)", fontsize=9)
        axis.set_xlabel("head")
    axes[0].set_ylabel("layer")
    return figure


def heat_map(axis: Axes, grid: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]) -> None:
    """0 to 100 in viridis, every cell with its number."""
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axis.grid(False)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            if value == value:  # not NaN
                colour = "#1d1f21" if value > 60 else "#f4f4f4"
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)


def panels(columns: int, *, rows: int = 1, height: float = 3.3) -> tuple[Figure, list[list[Axes]]]:
    """A figure of axes with a quiet grid, rows in one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.6, 4.6 * columns), height * rows), layout="constrained")
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharey="row").tolist()
    for axis in (axis for row in axes for axis in row):
        axis.grid(True, linewidth=0.7, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(INK)
        axis.tick_params(colors=INK, labelsize=9)
        for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
            label.set(color=INK, fontsize=10)
    return figure, axes


def look(name: str) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a system or a kind of memory."""
    kind = TRAINING_FREE if name.startswith(TRAINING_FREE) else (sized(name) or (name,))[0]
    colour, marker, dashes = LOOKS[kind]
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 5, "linewidth": 1.6}


def legend(figure: Figure) -> Figure:
    """One legend below for all axes, each label once."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= {label: one for label, one in zip(labels, handles, strict=True) if label not in found}
    figure.legend(found.values(), found, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    return figure


def tokens_axis(axis: Axes, label: str, at: Sequence[float]) -> None:
    """Powers of two along the bottom, with a tick at every value measured, or at some of many."""
    shown = sorted(set(at))
    shown = shown[:: -(-len(shown) // 9) or 1]
    axis.set_xscale("log", base=2)
    axis.set_xlabel(label)
    axis.set_xticks(shown, [short(tokens) for tokens in shown])
    axis.xaxis.minorticks_off()


def short(tokens: float) -> str:
    """65,536 is 64k."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"
