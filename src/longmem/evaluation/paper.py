"""What the paper reports, to stand beside our results: Wang et al., NeurIPS 2023 (arXiv 2306.07174).

A number marked (r) was recalled from the paper's tables and checked only by its sums and differences: it shows the
shape, and is no pass mark. In perplexities, % is the distance from the paper's own backbone.
"""

from __future__ import annotations

from typing import Any

from longmem.evaluation.pages import Table

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


def beside(result: dict[str, Any], name: str) -> Table | None:
    """The paper's table of the same kind of measurement; None where it has none.

    Args:
        name: of the result's file or folder; with ``--data`` it tells books from LaTeX.
    """
    if "protocols" not in result or "axes" in result:
        return TASKS.get(result.get("header", {}).get("task", ""))
    said = " ".join(map(str, [*result["header"]["config"].get("data", []), name])).lower()
    if "latex" in said or "arxiv" in said:
        return ARXIV
    return BOOKS if any(word in said for word in ("book", "pg19", "pg22", "gutenberg")) else None
