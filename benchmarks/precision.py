"""What the number format of a store costs: perplexity with memory in float32, float16, bfloat16 and int8.

Usage: python -m benchmarks.precision --model models/small/sidenet --data TEXT... [--tokens 4096] [--out FILE]

Every document is read segment by segment, each scored with the memory of those before it, which were rounded as a store
rounds them. The mean keys come from rounded keys here, while a store keeps them exact: a real store loses no more.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import surroundings
from benchmarks.segments import segment_loss, token_ids, whole_segments
from longmem import LongMem, MemoryBank
from longmem.data import load_tokenizer
from longmem.evaluation.bootstrap import Bootstrap, relative_difference
from longmem.evaluation.results import write_json
from longmem.store.arrays import pack, unpack
from longmem.store.records import DTYPES
from longmem.types import AttentionKV


def rounded(kv: AttentionKV, chunk_size: int, dtype: Any) -> AttentionKV:
    """A segment's keys and values (1, Hkv, T, D) as a store would give them back; T a multiple of S."""
    pair = torch.stack((kv.keys[0], kv.values[0]), dim=1).float()  # (Hkv, 2, T, D)
    heads, _, length, dim = pair.shape
    chunks = pair.view(heads, 2, -1, chunk_size, dim).permute(2, 0, 1, 3, 4).contiguous()
    stored = pack(chunks, torch.full((len(chunks),), chunk_size), dtype)
    back = unpack(stored.kv, stored.scales, dtype, torch.float32).permute(1, 2, 0, 3, 4).reshape(heads, 2, length, dim)
    return AttentionKV(back[None, :, 0], back[None, :, 1])


@torch.inference_mode()
def document_loss(model: LongMem, ids: Tensor, segment: int, dtype: Any | None) -> tuple[float, int]:
    """Summed loss in nats of a document (n,), and its number of tokens; without ``dtype``, memory is off."""
    bank = MemoryBank.for_model(model, rows=1)
    nats, count = 0.0, 0
    for part in whole_segments(ids, segment):
        out = model(part[None], memory=None if dtype is None else bank)
        nats, count = nats + segment_loss(out.logits, part), count + len(part) - 1
        if dtype is not None:
            bank.add(rounded(out.kv, bank.chunk_size, dtype))
    return nats, count


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure every format on the same documents, print and keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of every document")
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results/precision.json"))
    given = parser.parse_args(arguments)
    model = LongMem.from_pretrained(given.model).eval()
    tokenizer = load_tokenizer(given.model)
    documents = token_ids(tokenizer, given.data, given.documents, given.tokens)
    ids = [one for one in documents if len(one) >= 2 * given.segment]
    losses: dict[str, list[tuple[float, int]]] = {}
    for name in ("memory off", *DTYPES):
        print(f"{name} ...", file=sys.stderr, flush=True)
        dtype = None if name == "memory off" else name
        losses[name] = [document_loss(model, one, given.segment, dtype) for one in ids]
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.precision", *(sys.argv[1:] if arguments is None else arguments)]),
        "documents": len(ids),
        "tokens": sum(count for _, count in losses["float32"]),
        "surroundings": surroundings(torch.device("cpu")),
        "formats": {},
    }
    for name, each in losses.items():
        nats, counts = np.array(each, dtype=np.float64).T
        exact = np.array([one for one, _ in losses["float32"]])
        interval = Bootstrap().relative_difference(nats, exact, counts, "documents")
        percent, perplexity = relative_difference(nats, exact, counts), math.exp(nats.sum() / counts.sum())
        bounds = None if interval is None else [interval.low, interval.high]
        result["formats"][name] = {
            "perplexity": perplexity,
            "percent_against_float32": percent,
            "interval_over_documents": bounds,
        }
        print(f"{name:>12}: {perplexity:.4f}  {percent:+.4f} %  {bounds}")
    write_json(given.out, result)
    return result


if __name__ == "__main__":
    main()
