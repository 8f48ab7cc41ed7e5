"""What the paper reports, to stand beside ours: Wang et al., NeurIPS 2023 (arXiv 2306.07174).

A number marked ``recalled`` was written down from memory of the paper's tables and checked only by its sums and
differences: it shows the shape, and is no pass mark.
"""

from __future__ import annotations

from dataclasses import dataclass

from longmem.evaluation.systems import BACKBONE, LONGMEM, MEMTRM


@dataclass(frozen=True)
class Figure:
    """One number of the paper."""

    value: float
    recalled: bool = False

    def shown(self, digits: int = 2) -> str:
        """``22.78 (r)`` where it was recalled."""
        return f"{self.value:.{digits}f}" + (" (r)" if self.recalled else "")


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        task: of ours that measures the same.
        title: what the numbers are.
        columns: their heads.
        rows: name -> which of our systems it is, and a number for each column, None where the paper has none.
        setting: how the paper measured, in a line.
    """

    task: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, tuple[Figure | None, ...]]]
    setting: str
    digits: int = 2

    def of(self, system: str, column: str) -> list[tuple[str, Figure]]:
        """Rows of one of our systems that have a number in this column."""
        at = self.columns.index(column)
        return [(name, found) for name, (mine, line) in self.rows.items() if mine == system and (found := line[at])]

    @property
    def recalled(self) -> bool:
        return any(figure is not None and figure.recalled for _, line in self.rows.values() for figure in line)


def _known(*values: float) -> tuple[Figure | None, ...]:
    return tuple(Figure(value) for value in values)


def _recalled(*values: float) -> tuple[Figure | None, ...]:
    return tuple(Figure(value, recalled=True) for value in values)


MODEL = "GPT-2*, 407M parameters, 24 layers, window 1,024; SideNet of 151M"
TRAINING = "backbone about 117B tokens (r), SideNet and MemTRM 26B tokens"
MEMORY = "65,536 tokens, K 64, chunks of 4"
DATA = "a subset of the Pile; measured on PG-22 (Gutenberg books of 2020 to 2022) and arXiv"

BOOKS = PaperTable(
    task="perplexity",
    title="Perplexity of books (PG-22) by length of the document in tokens",
    columns=("5k-10k", "10k-100k", "100k-500k", "500k-1M"),
    rows={
        "GPT-2*": (BACKBONE, (*_recalled(22.78, 24.39, 24.12, 24.97),)),
        "MemTRM": (MEMTRM, (*_known(21.77, 23.56), *_recalled(23.23, 24.16))),
        "LongMem": (LONGMEM, (*_known(21.29, 23.01), *_recalled(22.55, 23.35))),
    },
    setting="segments of 1,024 tokens, 65,536 tokens of memory; per token of GPT-2's vocabulary",
)
ARXIV = PaperTable(
    task="perplexity",
    title="Perplexity of arXiv (LaTeX)",
    columns=("ArXiv",),
    rows={
        "GPT-2*": (BACKBONE, _known(11.05)),
        "MemTRM": (MEMTRM, _known(10.81)),
        "LongMem": (LONGMEM, _known(10.05)),
    },
    setting=BOOKS.setting,
)
CHAPTERBREAK = PaperTable(
    task="chapterbreak",
    title="ChapterBreak, AO3, suffix identification, accuracy in %; chance 16.7",
    columns=("4k", "6k", "8k"),
    rows={
        "GPT-2*": (BACKBONE, (Figure(18.4), None, None)),
        "MemTRM": (MEMTRM, (Figure(28.3), None, None)),
        "LongMem": (LONGMEM, (Figure(37.7), Figure(39.4, recalled=True), Figure(40.5))),
        "GPT-3, window of 2k": ("", (Figure(28.0), None, None)),
    },
    setting="six suffixes of 128 tokens; the models without columns of their own have one number, shown under 4k",
    digits=1,
)
ICL = PaperTable(
    task="icl",
    title="In-context learning with demonstrations in memory, accuracy in %",
    columns=("SST-2", "MR", "Subj", "SST-5", "MPQA", "average"),
    rows={
        "GPT-2*, 20": (BACKBONE, (*_recalled(68.2, 63.4, 57.6, 33.6, 70.8), Figure(58.7))),
        "MemTRM, 20 + 2,000": (MEMTRM, (*_recalled(65.1, 65.1, 58.2, 31.9, 72.7), Figure(58.6))),
        "LongMem, 4 + 2,000": (LONGMEM, (*_recalled(71.8, 65.1, 53.8, 36.0, 65.4), Figure(58.4))),
        "LongMem, 20 + 2,000": (LONGMEM, (*_recalled(78.0, 78.6, 65.6, 36.5, 74.6), Figure(66.7))),
    },
    setting="demonstrations in the window + in memory, mean of six seeds",
    digits=1,
)
SQUAD = PaperTable(
    task="squad",
    title="SQuAD, open-ended generation, 3 demonstrations in the window and 200 in memory",
    columns=("EM", "F1"),
    rows={
        "GPT-2*": (BACKBONE, _recalled(22.28, 30.78)),
        "LongMem": (LONGMEM, _recalled(26.77, 35.70)),
    },
    setting="exact match and F1 in %, official normalisation",
)
TABLES = (BOOKS, ARXIV, CHAPTERBREAK, ICL, SQUAD)

ABLATIONS = {
    "chunk_size": "The paper compares chunks of 2, 4 and 8 tokens: smaller is better for in-context learning.",
    "memory_size": "The paper compares 8k, 16k, 32k and 65k tokens at test time: more is not always better, 16k beat "
    "65k on books of 8k to 50k tokens.",
}
"""What the paper says of settings that we change too, in words: it is known to us without numbers."""

EFFICIENCY = (
    "The paper: the cost of a token stays flat while the context grows, that of dense attention does not (its "
    "attention was not fused; ours is, so time and memory of full attention are lower here to begin with)."
)


def relative(table: PaperTable, column: str) -> dict[str, tuple[float, bool]]:
    """How far each row is from the backbone's, in %: (distance, whether a recalled number is in it)."""
    base = table.of(BACKBONE, column)
    if not base:
        return {}
    (_, start), *_ = base
    found = {}
    at = table.columns.index(column)
    for name, (_, line) in table.rows.items():
        figure = line[at]
        if figure is not None and figure is not start:
            found[name] = (100 * (figure.value / start.value - 1), figure.recalled or start.recalled)
    return found
