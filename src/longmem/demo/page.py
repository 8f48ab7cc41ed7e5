"""A passage as a page: one file without outside parts, every text put in as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files

from longmem.demo.reading import Passage
from longmem.evaluation.perplexity import PerplexityResult


def page(passage: Passage, heads: int, table: Sequence[Sequence[str]]) -> str:
    """HTML of the passage and, below it, a table whose first row is its head."""
    data = {**asdict(passage), "heads": heads, "table": table}
    return _template().replace("__DATA__", _inside_script(data))


def perplexity_rows(result: PerplexityResult) -> list[list[str]]:
    """A row for each system and a column for each protocol, the first row being the head."""
    titles = {"segments": "consecutive segments", "sliding": "sliding window"}
    rows = [["", *(titles.get(name, name) for name in result.protocols)]]
    for system, label in result.systems.items():
        scores = [protocol.all for protocol in result.protocols.values()]
        cells = []
        for of_protocol in scores:
            against = of_protocol.difference(system, "backbone")
            percent = f" ({against.percent:+.1f} %)" if against is not None else ""
            cells.append(f"{of_protocol.system(system).perplexity:.2f}{percent}")
        rows.append([label, *cells])
    return rows


def _inside_script(data: object) -> str:
    """JSON that cannot end the element it stands in, whatever the texts hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _template() -> str:
    return (files("longmem.demo") / "page.html").read_text(encoding="utf-8")
