"""``longmem memory size``: what a memory will take."""

from __future__ import annotations

import click

from longmem.cli.memory.options import json_option
from longmem.cli.memory.printing import as_plain, print_columns, print_json
from longmem.errors import StoreError


def _counts(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """``65536,1M`` as numbers; M is a million."""
    if value is None:
        return None
    found = []
    for word in value.replace("_", "").upper().split(","):
        try:
            found.append(round(float(word[:-1]) * 1_000_000) if word.endswith("M") else int(word))
        except ValueError:
            raise click.BadParameter(f"{word!r} is no number of tokens; try 65536,1M,10M") from None
    return found


@click.command(epilog="Example: longmem memory size --heads-kv 8 --head-dim 128 --layers 32 --tokens 1M,50M")
@click.option("--heads-kv", type=int, help="Key/value heads of a backbone that is not in the table.")
@click.option("--head-dim", type=int, help="Its head dimension.")
@click.option("--layers", type=int, default=1, show_default=True, help="Its layers, for the comparison with a cache.")
@click.option("--chunk-size", type=int, default=4, show_default=True, help="Tokens per chunk.")
@click.option("--tokens", callback=_counts, help="How many tokens to remember. Default: 65536,1M,10M.")
@json_option
def size(
    heads_kv: int | None,
    head_dim: int | None,
    layers: int,
    chunk_size: int,
    tokens: list[int] | None,
    as_json: bool,
) -> None:
    """Show how many bytes a memory takes, by backbone.

    By token: keys and values in 16 and in 8 bits; the chunks' mean keys, which an open bank holds (keys and values are
    read for the chunks that are found); and, to compare, a full cache of all layers. In all, on disk, in 16 and in 8
    bits: keys and values, mean keys, token ids and text.
    """
    from longmem.store.sizes import BACKBONES, TOKENS, BackboneShape, memory_size, size_table

    if (heads_kv is None) != (head_dim is None):
        raise StoreError("--heads-kv and --head-dim go together; give both, or neither for the table")
    backbones = BACKBONES
    if heads_kv is not None and head_dim is not None:
        backbones = (BackboneShape("this one", layers, heads_kv, head_dim),)
    counts = TOKENS if tokens is None else tuple(tokens)
    if as_json:
        sizes = [
            memory_size(each, chunk_size=chunk_size, dtype=kind) for each in backbones for kind in ("float16", "int8")
        ]
        print_json(
            {
                "sizes": [
                    {**as_plain(each), "disk": each.disk, "disk_bytes": {str(n): each.disk_bytes(n) for n in counts}}
                    for each in sizes
                ]
            }
        )
        return
    heads, rows = size_table(backbones, chunk_size=chunk_size, tokens=counts)
    print_columns(heads, rows)
