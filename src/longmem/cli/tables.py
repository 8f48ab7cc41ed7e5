"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from longmem.evaluation.bootstrap import Interval
from longmem.evaluation.perplexity import PerplexityResult
from longmem.evaluation.runner import TaskResult
from longmem.evaluation.scores import Difference, ProtocolScores, Scores
from longmem.evaluation.systems import BACKBONE, CONTROL, MEMORY_OFF, MEMTRM, MEMTRM_OFF, sized

SHORT = {
    BACKBONE: "backbone",
    MEMORY_OFF: "memory off",
    MEMTRM_OFF: "memory off",
    CONTROL: "control",
    MEMTRM: "MemTRM",
}


def perplexity_tables(result: PerplexityResult) -> Iterator[RenderableType]:
    """For each protocol a table of all documents and of each group, then lengths and positions."""
    level = result.header.config["bootstrap"]["level"]
    for protocol in result.protocols.values():
        for scores in (protocol.all, *(protocol.groups if len(protocol.groups) > 1 else ())):
            yield Text(f"\n{_heading(protocol)}: {scores.name}, {scores.documents} documents, {scores.tokens:,} tokens")
            yield system_table(result, scores)
        if len(protocol.by_length) > 1:
            yield Text(f"\n{_heading(protocol)}: perplexity by length of the document in tokens")
            yield length_table(result, protocol)
        yield Text(f"\n{_heading(protocol)}: perplexity by position, the number of tokens before")
        yield position_table(result, protocol)
    if any(protocol.all.differences for protocol in result.protocols.values()):
        yield Text(f"\n% of perplexity per token, below 0 is better; {100 * level:g} % [over documents] (over blocks)")


def system_table(result: PerplexityResult, scores: Scores) -> Table:
    """Perplexities of every system, and how far each is from its baselines in %, with both intervals."""
    found = {(difference.system, _baseline(difference.against)): difference for difference in scores.differences}
    against = list(dict.fromkeys(baseline for _, baseline in found))
    table = Table(show_lines=bool(against))
    table.add_column("system", no_wrap=True)
    for name in ("per token", "per word", "bits/byte", *(f"% against {baseline}" for baseline in against)):
        table.add_column(name, justify="right")
    for score in scores.systems:
        differences = [found.get((score.system, baseline)) for baseline in against]
        table.add_row(
            result.systems[score.system],
            f"{score.perplexity:.3f}",
            f"{score.word_perplexity:,.2f}" if score.word_perplexity < 1e6 else f"{score.word_perplexity:.3g}",
            f"{score.bits_per_byte:.4f}",
            *(_difference(difference) for difference in differences),
        )
    return table


def _baseline(against: str) -> str:
    """What a column says its differences are against: the same kind of model for all of them, if not the same size."""
    kind = against if (memory := sized(against)) is None else memory[0]
    return SHORT.get(kind, kind.replace("training_free_", "training-free "))


def length_table(result: PerplexityResult, protocol: ProtocolScores) -> Table:
    """Perplexity by length of the document in tokens."""
    table = Table()
    table.add_column("system", no_wrap=True)
    for bucket in protocol.by_length:
        table.add_column(f"{bucket.name}\n{bucket.documents} documents", justify="right")
    for name, label in result.systems.items():
        table.add_row(label, *(f"{bucket.system(name).perplexity:.3f}" for bucket in protocol.by_length))
    return table


def position_table(result: PerplexityResult, protocol: ProtocolScores) -> Table:
    """Perplexity by number of tokens before."""
    table = Table()
    table.add_column("from")
    for label in result.systems.values():
        table.add_column(label.replace(", ", "\n", 1), justify="right")
    table.add_column("tokens", justify="right")
    for part in protocol.all.by_position:
        table.add_row(f"{part.low:,}", *(f"{part.perplexity[name]:.3f}" for name in result.systems), f"{part.tokens:,}")
    return table


def _heading(protocol: ProtocolScores) -> str:
    moved = "non-overlapping" if protocol.protocol == "segments" else f"stride {protocol.stride}"
    return f"{protocol.protocol} (window {protocol.window}, {moved})"


def _difference(difference: Difference | None) -> Text:
    if difference is None:
        return Text()
    edges = [f"{difference.percent:+.2f}"]
    for interval, (left, right) in ((difference.documents, "[]"), (difference.blocks, "()")):
        edges.append(_edges(interval, left, right))
    return Text("\n".join(edge for edge in edges if edge))  # not a str, whose brackets would be markup


def _edges(interval: Interval | None, left: str, right: str) -> str:
    return "" if interval is None else f"{left}{interval.low:+.2f}, {interval.high:+.2f}{right}"


def task_tables(result: TaskResult) -> Iterator[RenderableType]:
    """For each metric a table of systems by groups: means with their intervals; then why systems were left out."""
    for metric in result.metrics:
        chance = "" if metric.chance is None else f", chance {metric.chance:.3g}"
        unit = f" ({metric.unit})" if metric.unit else ""
        yield Text(f"\n{result.header.task}: {metric.label}{unit}, {metric.better} is better{chance}")
        for at in range(0, len(result.groups), 6):
            groups = result.groups[at : at + 6]
            table = Table(show_lines=True)
            table.add_column("system", no_wrap=True)
            for group in groups:
                table.add_column(f"{group.group}\n{group.examples:,} examples", justify="right")
            for name, label in result.systems.items():
                scores = [group.score(name, metric.name) for group in groups]
                table.add_row(label, *(f"{score.value:.4g}\n{_between(score.interval)}" for score in scores))
            yield table
    for name, reason in result.skipped.items():
        yield Text(f"{name} not asked: {reason}")


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval.low:.4g}, {interval.high:.4g}]"
