"""Tables of results of the benches, as Markdown; ``make_api.py`` puts them on the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from table_format import made_by, table


def bench_table(result: dict[str, Any], where: str) -> str:
    """The tables of a result of a bench, one for each kind of measurement in it, and where it was made.

    Args:
        where: name of its file.
    """
    tables = [made(result) for field, made in KINDS if field in result]
    return "\n\n".join([*filter(None, tables), _origin(result, where)]) + "\n\n"


def store_table(result: dict[str, Any]) -> str:
    """Of ``benchmarks.store``: a line for each store."""
    heads = [
        "store",
        "open",
        "one token: search, over bare product, over reading the keys once",
        "256 tokens: search, over bare product",
        "decoding, of the speed at the smallest",
        "bytes a token, of keys and values alone",
        "process grows by, chunk keys",
    ]
    rows = []
    for model in result["models"]:
        for size, one in model["sizes"].items():
            token, segment = one["token"], one["segment"]
            decode = model["decode"].get(size)
            rows.append(
                [
                    f"{_tokens(int(size))}, {model['heads']} x {result['head_dim']}, {model['dtype']}",
                    _milliseconds(one["open_seconds"]["median"]),
                    ", ".join(
                        [
                            _milliseconds(token["seconds"]["median"]),
                            _spread(token["over_matmul"]),
                            _spread(token["over_reading_keys"]),
                        ]
                    ),
                    f"{_milliseconds(segment['seconds']['median'])}, {_spread(segment['over_matmul'])}",
                    "-" if decode is None else _spread(decode["speed_over_smallest"]),
                    f"{one['bytes_per_token']:,.0f}, {one['bytes_over_theory']:.3f}",
                    f"{one['resident_bytes_searched'] / 2**20:,.0f} MiB, {one['chunk_key_bytes'] / 2**20:,.0f} MiB",
                ]
            )
    return "\n".join([table(heads, rows), *(_adding(model) for model in result["models"] if "add" in model)])


def recall_table(result: dict[str, Any]) -> str:
    """Of ``benchmarks.recall``: a line for each text, size and index."""
    heads = [
        "text, tokens",
        "index",
        "recall@16 (worst head, worst eighth of the text)",
        "attention kept",
        "key bytes read",
        "a token's search",
        "exactly",
        "exact over it",
        "built in, holds",
    ]
    rows = []
    for text, record in result["texts"].items():
        for size in record["sizes"]:
            for index, found in size.items():
                if index == "tokens":
                    continue
                rows.append(
                    [
                        f"{text}, {_tokens(size['tokens'])}",
                        f"`{index}`",
                        f"{found['recall']:.3f} ({min(found['recall_by_head']):.3f}, {min(found['recall_along']):.3f})",
                        f"{found['attention_kept']:.3f}",
                        f"{found['keys_read']:.3f}",
                        f"{found['milliseconds']:.2f} ms",
                        f"{found['exact_milliseconds']:.2f} ms",
                        f"{found['exact_over_index']:.2f}",
                        f"{found['build_seconds']:.1f} s, {found['state_bytes'] / 2**20:.0f} MiB",
                    ]
                )
    return table(heads, rows) if rows else ""


def decoding_table(result: dict[str, Any]) -> str:
    """Of the decoding part of ``benchmarks.recall``: time of a token by memory and index, median (least to most)."""
    found = result["decoding"]
    rows = [[name, _spread(values, 1000, " ms")] for name, values in found["seconds_per_token"].items()]
    small, large = (_tokens(size) for size in found["sizes"])
    told = [
        f"Decoding at {large} by `{index}`, of the speed at {small} by whatever is fastest there: {_spread(values)}."
        for index, values in found["speed_against_fastest_of_the_small_memory"].items()
    ]
    by_clock = found["seconds_per_token_by_wall_clock"]
    rows = [[*row, _spread(by_clock[row[0]], 1000, " ms")] for row in rows]
    told += [
        f"The same by the clock on the wall, `{index}`: {_spread(values)}."
        for index, values in found["speed_against_fastest_of_the_small_memory_by_wall_clock"].items()
    ]
    return "\n".join([table(["memory", "a token, processor time", "by the clock on the wall"], rows), "", *told])


def ways_table(result: dict[str, Any]) -> str:
    """Of the candidates of ``benchmarks.recall``: what each way would read for a recall of 0.95, the least first."""
    rows = [
        [
            f"{text}, {_tokens(record['candidates']['tokens'])}",
            each["way"],
            each["variant"],
            f"{each['key_bytes_read']:.3f}",
        ]
        for text, record in result["texts"].items()
        if "candidates" in record
        for each in sorted(record["candidates"]["ways"], key=lambda way: float(way["key_bytes_read"]))
    ]
    return table(["text, tokens", "way", "variant", "key bytes read"], rows) if rows else ""


def stale_table(result: dict[str, Any]) -> str:
    """Of ``benchmarks.staleness``: a line for each text."""
    rows = []
    for name, text in result["stale"].items():
        cells = [f"{text['off']['perplexity']:.2f}"]
        for way in ("fresh", "stale"):
            found = text[way]
            edges = f" [{found['interval'][0]:+.1f}, {found['interval'][1]:+.1f}]" if found["interval"] else ""
            cells.append(f"{found['perplexity']:.2f} ({found['percent_against_off']:+.1f} %{edges})")
        rows.append([f"{name}, {text['documents']} documents", *cells])
    return table(["MemTRM, by segments", "memory off", "its own memory", "written before it was trained"], rows)


def training_table(result: dict[str, Any]) -> str:
    """Of ``benchmarks.training``: a line for each run."""
    rows = []
    for name, run in result["trainings"].items():
        valid = run["valid"][-1] if run["valid"] else {}
        losses = [valid.get(field) for field in ("loss", "loss_memory_off", "loss_backbone")]
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        rows.append([name, f"{run['steps']:,}", f"{run['tokens']:,}", f"{run['seconds'] / 60:.0f}", *cells])
    heads = ["training", "steps", "tokens", "minutes", "validation loss, nats", "with memory off", "of its backbone"]
    return table(heads, rows)


KINDS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("models", store_table),
    ("texts", recall_table),
    ("texts", ways_table),
    ("decoding", decoding_table),
    ("stale", stale_table),
    ("trainings", training_table),
)
"""By the field that a result of this kind has."""


def _adding(model: dict[str, Any]) -> str:
    add = model["add"]
    parts = [
        f"into {'an empty store' if name == 'empty' else f'one of {_tokens(int(name))}'} "
        f"{_spread(into['over_plain_forward'])}"
        for name, into in add["into"].items()
    ]
    return (
        f"\nAdding with a real backbone ({model['heads']} x 64, {model['layers']} layers, remembered in layer "
        f"{model['memory_layer']}), tokens/s over those of its plain forward: {', '.join(parts)}; "
        f"the full store over the empty one {_spread(add['full_over_empty'])}, "
        f"in processor time {_spread(add['full_over_empty_processor'])}."
    )


def _origin(result: dict[str, Any], where: str) -> str:
    around = result["surroundings"]
    machine = f"{around['machine']}, {around['threads']} thread, torch {around['torch']}, {around['date']}"
    busy = f"load {around['load_average'][0]} on {around['cores']} cores"
    return f"{machine}, {busy}. {made_by(where, result['command'])}"


def _spread(values: dict[str, float], by: float = 1, unit: str = "") -> str:
    median, least, most = (values[name] * by for name in ("median", "min", "max"))
    return f"{median:.2f}{unit} ({least:.2f} to {most:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds > 0.1 else f"{seconds * 1000:.1f} ms"


def _tokens(count: int) -> str:
    return f"{count / 2**20:.0f}M" if count >= 2**20 else f"{count:,}"
